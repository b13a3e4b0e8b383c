"""A model's configuration: everything in which the supported architectures differ, as frozen data.

`ModelConfig.from_dict` reads the `config.json` of a Hugging Face directory (a GGUF file's metadata comes translated to
the same keys). It applies the defaults that transformers' configuration classes have, and refuses by name what it does
not know: a key that is neither read nor known to be harmless might change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.fields import Fields
from mpillm.model.known_keys import is_harmless
from mpillm.model.rope import RopeConfig
from mpillm.model.rope_fields import LONGEST, read_rope
from mpillm.partition.grid import Shape

# What an absent key means, per architecture: the defaults of transformers' configuration classes. Sizes have none.
_SMALL_BOS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **_SMALL_BOS}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, **_SMALL_BOS},
    "MistralForCausalLM": {"sliding_window": 4096, **_MISTRAL},
    "MixtralForCausalLM": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_MISTRAL,
    },
    "Qwen2ForCausalLM": {"max_window_layers": 28, **_QWEN},
    "Qwen3ForCausalLM": {"max_window_layers": 28, "head_dim": 128, **_QWEN},
    "Qwen3MoeForCausalLM": {
        **_QWEN,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know of a model besides its weights.

    `windows` has a number per layer: a token sees itself and the `window - 1` tokens before it, 0 means all before it.
    `attention_bias` speaks of q, k and v, `o_bias` of the attention's output. `moe_layers` says which layers have
    experts; without any, `n_experts` is 0. `norm_topk` divides the chosen experts' weights by their sum.
    """

    architecture: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rms_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    n_experts: int
    experts_per_token: int
    moe_intermediate: int
    norm_topk: bool
    moe_layers: tuple[bool, ...]
    max_position: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @staticmethod
    def from_dict(config: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
        """The configuration in a dict with Hugging Face's keys; `name` is how error messages call it."""
        return _read(config, name)

    def shape(self, unit: int) -> Shape:
        """What decides how the model can be cut; `unit` is 32 if any weight is quantised, else 1."""
        return Shape(
            n_layers=self.n_layers,
            hidden=self.hidden,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            intermediate=0 if all(self.moe_layers) else self.intermediate,
            vocab=self.vocab,
            n_experts=self.n_experts,
            moe_intermediate=self.moe_intermediate,
            unit=unit,
        )


def _read(config: Mapping[str, Any], name: str) -> ModelConfig:
    if not isinstance(config, Mapping):
        raise ModelError(f"{name}: expected an object with the model's configuration.")
    architecture = _architecture(config, name)
    fields = Fields(config, name, DEFAULTS[architecture])
    fields.read |= {"architectures", "model_type"}

    fields.one_of("hidden_act", ("silu", "swish"), default="silu")  # two names of one function
    n_layers = fields.integer("num_hidden_layers", 1, 4096)
    hidden = fields.integer("hidden_size", 1, 2**20)
    intermediate = fields.integer("intermediate_size", 1, 2**24)
    n_heads, n_kv_heads, head_dim = _heads(fields, hidden)
    max_position = fields.integer("max_position_embeddings", 1, LONGEST)
    vocab = fields.integer("vocab_size", 1, 2**24)
    windows = _windows(fields, architecture, n_layers)
    n_experts, per_token, moe_width, norm_topk, moe_layers = _experts(
        fields, architecture, n_layers, intermediate
    )
    attention_bias, o_bias, mlp_bias = _biases(fields, architecture)
    bos, eos = (fields.integers(key, -LONGEST, LONGEST) for key in ("bos_token_id", "eos_token_id"))

    result = ModelConfig(
        architecture=architecture,
        n_layers=n_layers,
        hidden=hidden,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        rms_eps=fields.number("rms_norm_eps", 0, 1, default=1e-6),
        rope=read_rope(fields, fields.defaults.get("rope_theta", 1e4), max_position, head_dim),
        windows=windows,
        attention_bias=attention_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=_qk_norm(fields, architecture),
        tied=fields.flag("tie_word_embeddings"),
        n_experts=n_experts,
        experts_per_token=per_token,
        moe_intermediate=moe_width,
        norm_topk=norm_topk,
        moe_layers=moe_layers,
        max_position=max_position,
        # Ids outside the vocabulary stand in for "none" in some published configurations.
        bos_id=next((token for token in bos if 0 <= token < vocab), None),
        eos_ids=tuple(token for token in eos if 0 <= token < vocab),
    )
    _refuse_unknown(fields, architecture)
    return result


def _architecture(config: Mapping[str, Any], name: str) -> str:
    supported = f"supported are {', '.join(DEFAULTS)}"
    named, model_type = config.get("architectures"), config.get("model_type")
    if named is None:
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ModelError(f"{name}: architectures is missing; {supported}.")
        return MODEL_TYPES[model_type]
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ModelError(f"{name}: architectures must be a list of one name; {supported}.")
    architecture = named[0]
    if architecture not in DEFAULTS:
        raise ModelError(f"{name}: architecture {architecture[:60]!r} is not supported; {supported}.")
    if model_type is not None and (
        not isinstance(model_type, str) or MODEL_TYPES.get(model_type) != architecture
    ):
        raise ModelError(f"{name}: model_type {str(model_type)[:60]!r} does not belong to {architecture}.")
    return architecture


def _heads(fields: Fields, hidden: int) -> tuple[int, int, int]:
    """Heads, key/value heads, and the dimension of one."""
    n_heads = fields.integer("num_attention_heads", 1, 2**16)
    n_kv_heads = fields.integer("num_key_value_heads", 1, 2**16, default=n_heads)
    if n_heads % n_kv_heads:
        raise fields.fail(
            "num_attention_heads", f"but must be a multiple of num_key_value_heads ({n_kv_heads})"
        )
    head_dim = fields.optional_integer("head_dim", 1, 2**16)
    if head_dim is None:
        head_dim = hidden // n_heads
    if head_dim < 2 or head_dim % 2:
        raise ModelError(
            f"{fields.name}: a head has {head_dim} dimensions, but rope needs an even number of them."
        )
    return n_heads, n_kv_heads, head_dim


def _windows(fields: Fields, architecture: str, n_layers: int) -> tuple[int, ...]:
    """Each layer's sliding window, 0 where there is none."""
    window = 0
    if architecture in {"MistralForCausalLM", "MixtralForCausalLM"}:
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
    elif architecture.startswith("Qwen"):
        if fields.flag("use_sliding_window"):
            window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        # Ticked off whether used or not: a window that is switched off may have any value.
        fields.read |= {"sliding_window", "max_window_layers"}
    # In the other architectures a window is every layer's, or there is none and its keys are refused unless null.
    choice = architecture in {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}

    layer_types = fields.raw("layer_types")
    if layer_types is None:
        full = fields.integer("max_window_layers", 0, LONGEST) if window and choice else 0
        return tuple(window if layer >= full else 0 for layer in range(n_layers))
    if not isinstance(layer_types, list) or len(layer_types) != n_layers:
        raise fields.fail("layer_types", f"but must be a list of {n_layers} names, one per layer")
    unknown = [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ModelError(
            f"{fields.name}: layer type {str(unknown[0])[:60]!r} in layer_types is not supported."
        )
    if "sliding_attention" in layer_types and not window:
        raise ModelError(
            f"{fields.name}: layer_types has sliding_attention, but no sliding_window is in use."
        )
    if window and not choice and "full_attention" in layer_types:
        raise ModelError(
            f"{fields.name}: layer_types has full_attention, but {architecture} has windows in all layers."
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _experts(
    fields: Fields, architecture: str, n_layers: int, intermediate: int
) -> tuple[int, int, int, bool, tuple[bool, ...]]:
    """Experts, experts per token, an expert's width, whether weights are divided by their sum, and which layers."""
    mixtral = architecture == "MixtralForCausalLM"
    if not mixtral and architecture != "Qwen3MoeForCausalLM":
        return 0, 0, 0, False, (False,) * n_layers

    # transformers has both names for one number, and writes either.
    old, new = (fields.optional_integer(key, 0, 2**16) for key in ("num_experts", "num_local_experts"))
    if "num_experts" in fields.values and "num_local_experts" in fields.values and old != new:
        raise fields.fail("num_experts", f"but num_local_experts is {new}")
    n_experts = old if old is not None else new
    if n_experts is None:
        n_experts = int(fields.defaults["num_local_experts"])
    per_token = fields.integer("num_experts_per_tok", 1, 2**16)
    if mixtral:
        width, norm_topk, moe_layers = intermediate, True, (n_experts > 0,) * n_layers
        if n_experts == 0:
            raise fields.fail("num_local_experts", "but must be at least 1")
        if fields.raw("norm_topk_prob") is False:
            raise fields.fail("norm_topk_prob", "but Mixtral always divides by the sum")
    else:
        width = fields.integer("moe_intermediate_size", 1, 2**24)
        norm_topk = fields.flag("norm_topk_prob")
        step = fields.integer("decoder_sparse_step", 1, LONGEST, default=1)
        dense = fields.integers("mlp_only_layers", 0, LONGEST)
        moe_layers = tuple(
            n_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(n_layers)
        )
    if not any(moe_layers):
        return 0, 0, 0, False, moe_layers
    if per_token > n_experts:
        raise fields.fail("num_experts_per_tok", f"but the model has {n_experts} experts")
    return n_experts, per_token, width, norm_topk, moe_layers


def _biases(fields: Fields, architecture: str) -> tuple[bool, bool, bool]:
    """Whether q, k, v have biases, whether the attention's output has, and whether the dense feed-forward has."""
    if architecture == "Qwen2ForCausalLM":
        for key in ("attention_bias", "qkv_bias"):  # exporters may say so, but may not deny it
            if fields.raw(key) not in (None, True):
                raise fields.fail(key, "but Qwen2ForCausalLM always has biases on q, k and v")
        return True, False, False
    if architecture in {"MistralForCausalLM", "MixtralForCausalLM"}:
        return False, False, False
    attention_bias = fields.flag("attention_bias")
    return (
        attention_bias,
        attention_bias,
        fields.flag("mlp_bias") if architecture == "LlamaForCausalLM" else False,
    )


def _qk_norm(fields: Fields, architecture: str) -> bool:
    """Whether queries and keys are normalised per head: Qwen 3's always are."""
    qwen3 = architecture.startswith("Qwen3")
    if fields.raw("use_qk_norm") not in (None, qwen3):
        raise fields.fail("use_qk_norm", f"but {architecture} is built {'with' if qwen3 else 'without'} that")
    return qwen3


def _refuse_unknown(fields: Fields, architecture: str) -> None:
    unknown = {key: value for key, value in fields.unread().items() if not is_harmless(key, value)}
    if unknown:
        shown = ", ".join(f"{key} = {str(value)[:40]}" for key, value in sorted(unknown.items())[:4])
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ModelError(
            f"{fields.name}: {shown}{more} may change the result and is not supported in {architecture}."
        )
