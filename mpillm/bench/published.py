"""Well-known models by their published configurations: their tensors, and the metadata of a GGUF file of them.

The tensors are those that the model's family asks for, under the names that llama.cpp's files have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families import gguf_family, read_config
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.names import Roles
from mpillm.weights.roles import ROLES


@dataclass(frozen=True)
class Published:
    """A model's general.architecture, its configuration with Hugging Face's keys, and its fields in a GGUF file."""

    architecture: str
    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    unused: tuple[str, ...] = ()  # names of tensors that other files of the family have

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def vocab(self) -> int:
        """The number of tokens of the vocabulary."""
        return int(self.config["vocab_size"])

    def of_layers(self, layers: int) -> Published:
        """Return this model with only its first layers."""
        of_each = {
            key: value[:layers]
            for key, value in self.config.items()
            if isinstance(value, list) and len(value) == self.layers
        }
        return replace(self, config={**self.config, **of_each, "num_hidden_layers": layers})

    def model(self) -> ModelConfig:
        """Return the model that its family makes of the configuration."""
        return read_config(self.config, self.architecture)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name and shape of every tensor, and whether it is a matrix that is quantised, in the order of use."""
        model, names = self.model(), _Names(self.architecture, self.unused)
        yield from names.placed([model.embed], 0)
        for layer in range(model.n_layers):
            yield from names.placed([spec for page in model.pages(layer) for spec in page.tensors], 0)
            if experts := model.experts(layer):
                yield from names.placed(list(experts[0].tensors), len(experts))
        tied = self.config.get("tie_word_embeddings", False)
        yield from names.placed(
            [spec for spec in model.head.tensors if not tied or spec.key.role != "head"], 0
        )

    def metadata(self) -> Iterator[tuple[str, Any]]:
        """Yield the fields of a GGUF file, without the architecture's name before them."""
        config = self.config
        for name, key in _USUAL.items():
            if key in config:
                yield name, config[key]
        yield from self.fields.items()


class _Names:
    """The names of an architecture's tensors in GGUF files."""

    def __init__(self, kind: str, unused: tuple[str, ...]) -> None:
        own = gguf_family(kind, kind).names
        self._stacked: dict[Roles, str] = {roles: name for name, roles in own.gguf_stacked.items()}
        self._own: dict[Roles, str] = {}
        for name, roles in own.gguf.items():
            if name not in unused:
                self._own.setdefault(roles, name)

    def placed(self, specs: list[TensorSpec], experts: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Yield the tensors of a layer, or of its `experts` experts, which a file holds in one tensor."""
        left = {spec.key.role: spec for spec in specs}
        layer = specs[0].key.layer if specs else -1
        for roles, name in self._own.items():  # several matrices in one tensor
            if len(roles) > 1 and all(role in left for role in roles):
                parts = [left.pop(role) for role in roles]
                yield self._entry(name, layer, [_shape(part) for part in parts], roles[0], 0)
        for role, spec in left.items():
            if experts:
                name = self._stacked.get((role,)) or ROLES[role].gguf_stacked[0]
            else:
                name = self._own.get((role,), ROLES[role].gguf)
            yield self._entry(name, layer, [_shape(spec)], role, experts)

    def _entry(
        self, name: str, layer: int, shapes: list[tuple[int, ...]], role: str, experts: int
    ) -> tuple[str, tuple[int, ...], bool]:
        rows = sum(shape[0] for shape in shapes)
        shape = (*([experts] if experts else []), rows, *shapes[0][1:])
        return name.format(l=layer), shape, ROLES[role].quantisable or role == "embed"


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape in a file, where convolutions are matrices and heads' matrices have three dimensions."""
    if spec.key.role.endswith("_conv"):
        return spec.shape[0] // _TAPS, _TAPS
    if spec.matrices:
        return spec.shape[0] // spec.matrices, spec.matrices, spec.shape[1]
    return spec.shape


_TAPS = 4  # the taps of every short convolution in these models
_USUAL = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def _gpt_oss(layers: int, experts: int) -> Published:
    return Published(
        "gpt-oss",
        {
            "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "num_hidden_layers": layers,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
            "vocab_size": 201088, "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        {
            "expert_count": experts, "expert_used_count": 4, "expert_feed_forward_length": 2880,
            "attention.sliding_window": 128, "rope.dimension_count": 64, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        },
    )  # fmt: skip


PUBLISHED: dict[str, Published] = {
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "deepseek-v3": Published(
        "deepseek2",
        {
            "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280,
            "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
            },
        },
        {
            "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512, "attention.key_length": 576,
            "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
            "rope.dimension_count": 64, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_log_multiplier": 0.1,
            "expert_count": 256, "expert_used_count": 8, "expert_shared_count": 1,
            "expert_feed_forward_length": 2048, "expert_weights_scale": 2.5, "expert_weights_norm": True,
            "expert_gating_func": 2, "expert_group_count": 8, "expert_group_used_count": 4,
            "leading_dense_block_count": 3,
        },
    ),
    "glm-4.5-air": Published(
        "glm4moe",
        {
            "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944,
            "vocab_size": 151552, "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 1.0, "attention_bias": True, "use_qk_norm": False,
            "partial_rotary_factor": 0.5, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
        },
        {
            "rope.dimension_count": 64, "expert_count": 128, "expert_used_count": 8, "expert_shared_count": 1,
            "expert_feed_forward_length": 1408, "expert_weights_scale": 1.0, "expert_weights_norm": True,
            "expert_gating_func": 2, "expert_group_count": 1, "expert_group_used_count": 1,
            "leading_dense_block_count": 1,
        },
    ),
    "qwen3.6-35b-a3b": Published(
        "qwen35moe",
        {
            "architectures": ["Qwen3_5MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 40,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320,
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "full_attention_interval": 4, "linear_conv_kernel_dim": _TAPS,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
        },
        {
            "rope.freq_base": 10000000.0, "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0],
            "full_attention_interval": 4,
            "ssm.conv_kernel": _TAPS, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32,
            "ssm.inner_size": 4096, "expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 512,
            "expert_shared_feed_forward_length": 512,
        },
        unused=("blk.{l}.ssm_ba.weight",),  # Qwen3-Next's
    ),
    "gemma-3-27b": Published(
        "gemma3",
        {
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 21504,
            "vocab_size": 262208, "sliding_window": 1024, "sliding_window_pattern": 6, "query_pre_attn_scalar": 168,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "tie_word_embeddings": True,
        },
        {
            "attention.sliding_window": 1024, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        },
    ),
}  # fmt: skip
