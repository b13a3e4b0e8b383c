"""The common part of families: reading sizes, heads, windows, experts and special tokens of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.families.tasks import last_token_classifier
from mpillm.model.fields import Fields
from mpillm.model.known_keys import is_harmless, is_switch
from mpillm.model.layers.attention import AttentionSpec, Rotary
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.pooled import ClassifierSpec
from mpillm.model.rope_fields import LONGEST, read_rope, rope_parameters
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf
from mpillm.weights.names import Names, RowGroups

SMALL_BOS = {"bos_token_id": 1, "eos_token_id": 2}
ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,  # two names of one function
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
    "sigmoid": Activation.SIGMOID,
    "linear": Activation.IDENTITY,
}


class Family:
    """A family of models: one file, which `families.FAMILIES` lists.

    `architectures` are transformers' classes with their model_type, `model_types` other values of model_type with
    the class that they stand for, `gguf` the values of general.architecture that it reads, `gguf_adapters` others that
    files with adapters of its models may have, `names` what its tensors are called, and `tied` what an absent
    tie_word_embeddings means. With `yarn_multiplies_scores` a GGUF file's yarn multiplies attention's scores, as its
    log multiplier says. `defaults` has what other absent keys mean, by class: the defaults of transformers'
    configuration classes. Sizes have none.
    """

    architectures: ClassVar[Mapping[str, str]]
    model_types: ClassVar[Mapping[str, str]] = {}  # further ones, with the class that computes them
    gguf: ClassVar[tuple[str, ...]] = ()
    gguf_adapters: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[Names] = Names()
    tied: ClassVar[bool] = False
    yarn_multiplies_scores: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]]

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        """Return the model of a configuration with Hugging Face's keys; ModelError says what is wrong with it."""
        raise NotImplementedError

    def classifier(self, fields: Fields) -> ClassifierSpec:
        """Return the classifier of its classes ...ForSequenceClassification."""
        return last_token_classifier(fields)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        """Return the division of tensors that hold several matrices; tensors that are not in it have equal parts.

        `config` has Hugging Face's keys, and may not have been judged yet.
        """
        return {}

    def gguf_names(self, tensors: Collection[str]) -> Names:
        """Return the names of the tensors of a GGUF file that has these `tensors`."""
        return self.names

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """Return the configuration of a GGUF file with Hugging Face's keys, without its RoPE.

        `shape_of` tells a tensor's shape, or None if it is not there; of a matrix that lies in one tensor with others,
        the shape of that tensor.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Sizes:
    """The numbers that nearly all configurations have."""

    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position: int
    vocab: int


def read_sizes(fields: Fields, n_layers: int | None = None) -> Sizes:
    """Return the sizes of a configuration; `n_layers` is given where num_hidden_layers does not count."""
    if n_layers is None:
        n_layers = fields.integer("num_hidden_layers", 1, 4096)
    hidden = fields.integer("hidden_size", 1, 2**20)
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
    max_position = fields.integer("max_position_embeddings", 1, LONGEST)
    vocab = fields.integer("vocab_size", 1, 2**24)
    return Sizes(n_layers, hidden, n_heads, n_kv_heads, head_dim, max_position, vocab)


def read_width(fields: Fields, key: str = "intermediate_size") -> int:
    """Return the inner columns of an MLP."""
    return fields.integer(key, 1, 2**24)


def read_activation(fields: Fields, default: str = "silu", key: str = "hidden_act") -> Activation:
    """Return the activation of MLPs, by transformers' name of it."""
    return ACTIVATIONS[fields.one_of(key, tuple(ACTIVATIONS), default)]


def require_silu(fields: Fields, key: str = "hidden_act") -> None:
    """Raise ModelError unless the activation is SiLU, which it is in mixers with a state too."""
    fields.one_of(key, ("silu", "swish"), default="silu")


def read_norm(fields: Fields, key: str = "rms_norm_eps", default: float = 1e-6, **more: Any) -> NormSpec:
    """Return the norm of all layers; `more` is what else the family says of it."""
    return NormSpec(fields.number(key, 0, 1, default=default), **more)


def attention_of(
    sizes: Sizes, rotary: Rotary | None, window: int = 0, *, scale: float | None = None, **more: Any
) -> AttentionSpec:
    """Attention of these sizes, with scores times 1 / sqrt(head_dim) unless `scale` says otherwise."""
    if scale is None:
        scale = sizes.head_dim**-0.5
    return AttentionSpec(sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, scale, rotary, window, **more)


def read_rotary(
    fields: Fields, sizes: Sizes, dim: int | None = None, interleaved: bool = False, layer_type: str = ""
) -> Rotary:
    """RoPE of the first `dim` dimensions of a head, or of all of them; `layer_type` as in `read_rope`."""
    dim = sizes.head_dim if dim is None else dim
    theta = fields.defaults.get("rope_theta", 1e4)
    rope = read_rope(fields, theta, sizes.max_position, dim, sizes.head_dim, layer_type)
    return Rotary(rope, dim, interleaved)


def read_partial_rotary(
    fields: Fields, sizes: Sizes, default: float, interleaved: bool = False, odd: bool = True
) -> Rotary:
    """RoPE of a part of each head: partial_rotary_factor of the RoPE's table, or else beside it.

    `odd`: whether transformers runs models of the class in which an odd number of dimensions rotates.
    """
    inner = rope_parameters(fields).optional_number("partial_rotary_factor", 0, 1)
    outer = fields.optional_number("partial_rotary_factor", 0, 1)
    part = next((value for value in (inner, outer) if value is not None), default)  # as in transformers
    dim = int(sizes.head_dim * part)
    what = f"{fields.name}: partial_rotary_factor is {part:g}, which makes"
    if dim < 1:
        raise ModelError(f"{what} {dim} of {sizes.head_dim} dimensions rotate.")
    rotary = read_rotary(fields, sizes, dim + dim % 2, interleaved)
    if dim % 2 == 0:
        return rotary
    # An odd number: one more turns, by the powers of the base that the odd number makes.
    if not odd or rotary.config.kind not in ("default", "linear"):
        raise ModelError(f"{what} {dim} dimensions rotate, an odd number.")
    theta = rotary.config.theta ** ((dim + 1) / dim)
    return replace(rotary, config=replace(rotary.config, theta=theta))


def read_expert_count(fields: Fields) -> int:
    """Return the number of experts of a layer: transformers has two names for it, and writes either."""
    old, new = (fields.optional_integer(key, 0, 2**16) for key in ("num_experts", "num_local_experts"))
    if "num_experts" in fields.values and "num_local_experts" in fields.values and old != new:
        raise fields.fail("num_experts", f"but num_local_experts is {new}")
    count = old if old is not None else new
    return int(fields.defaults["num_local_experts"]) if count is None else count


def read_chosen(fields: Fields, count: int, key: str = "num_experts_per_tok") -> int:
    """Return the number of experts, of `count`, to which a token goes."""
    chosen = fields.integer(key, 1, 2**16)
    if chosen > count:
        raise fields.fail(key, f"but the model has {count} experts")
    return chosen


def model(
    fields: Fields,
    architecture: str,
    sizes: Sizes,
    layer: Callable[[int], LayerSpec],
    final_norm: NormSpec | None,
    **more: Any,
) -> ModelConfig:
    """Return the model of these layers; `more` is what else the family says. Reads the rest: special tokens, tying."""
    bos, eos = (fields.integers(key, -LONGEST, LONGEST) for key in ("bos_token_id", "eos_token_id"))
    fields.flag("tie_word_embeddings")  # the tensors say so
    layers = tuple(layer(number) for number in range(sizes.n_layers))
    _check_layer_types(fields, architecture, layers)
    found = ModelConfig(
        architecture=architecture,
        hidden=sizes.hidden,
        vocab=sizes.vocab,
        layers=layers,
        final_norm=final_norm,
        max_position=_longest(fields, sizes.max_position),
        short_length=_short_length(fields, layers),
        # Ids outside the vocabulary stand in for "none" in some published configurations.
        bos_id=next((token for token in bos if 0 <= token < sizes.vocab), None),
        eos_ids=tuple(token for token in eos if 0 <= token < sizes.vocab),
        **more,
    )
    unknown = {key: value for key, value in fields.unread().items() if not is_harmless(key, value)}
    if switches := {key: value for key, value in unknown.items() if is_switch(key)}:
        shown = ", ".join(f"{key} = {str(value)[:40]}" for key, value in sorted(switches.items())[:4])
        others = f" and {len(switches) - 4} more" if len(switches) > 4 else ""
        raise ModelError(
            f"{fields.name}: {shown}{others} may change the result and is not supported in {architecture}."
        )
    return replace(found, ignored_keys=tuple(sorted(unknown)))


def _check_layer_types(fields: Fields, architecture: str, layers: Sequence[LayerSpec]) -> None:
    """Raise ModelError if layer_types, which the family has not read, says something else than what its layers are."""
    if "layer_types" in fields.read:
        return
    types = read_layer_types(fields, len(layers), FULL, SLIDING)
    for number, kind in enumerate(types or ()):
        window = getattr(layers[number].mixer, "window", 0)
        if (kind == SLIDING) != (window > 0):
            raise ModelError(
                f"{fields.name}: layer_types has {kind} for layer {number}, but {architecture} has "
                f"{f'a window of {window} tokens' if window else 'no window'} there."
            )


def _longest(fields: Fields, max_position: int) -> int:
    """Return the most positions of a sequence.

    Dual chunk attention (Qwen 2.5 1M) changes nothing up to the length that the model was trained with: longer
    sequences are not computed.
    """
    border = fields.table("dual_chunk_attention_config").get("original_max_position_embeddings")
    return min(max_position, border) if type(border) is int and border > 0 else max_position


def _short_length(fields: Fields, layers: Sequence[LayerSpec]) -> int:
    """Return the tokens of the longest sequence that has LongRoPE's short factors; 0 without LongRoPE."""
    rotaries = {getattr(layer.mixer, "rotary", None) for layer in layers}
    lengths = {
        rotary.config.original_max_position
        for rotary in rotaries
        if isinstance(rotary, Rotary) and rotary.config.long_factors
    }
    if len(lengths) > 1:
        raise ModelError(
            f"{fields.name}: layers whose LongRoPE begins at different lengths are not supported."
        )
    return max(lengths, default=0)


def refuse_qk_norm(fields: Fields, architecture: str, has: bool) -> None:
    """Raise ModelError if use_qk_norm says something else than what the architecture is built with."""
    if fields.raw("use_qk_norm") not in (None, has):
        raise fields.fail("use_qk_norm", f"but {architecture} is built {'with' if has else 'without'} that")
