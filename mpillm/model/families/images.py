"""Models with parts for images: their text part is one of the families, and is run as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Classes whose text part, given a text alone, computes what a class for causal language modelling does. Its
# model_type says which one.
WITH_IMAGES = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        "AyaVision", "Cohere2Vision", "Gemma3", "Gemma4", "Gemma4Unified", "Glm4v", "Glm4vMoe", "InternVL", "KimiVL",
        "Llama4", "Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "Mistral3", "Qwen2VL", "Qwen2_5_VL",
        "Qwen3VL", "Qwen3_5", "Qwen3_5Moe", "VipLlava",
    )
)  # fmt: skip

# Sizes that published files leave out of text_config: the defaults of transformers' classes.
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
TEXT_SIZES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {**_LLAMA, "intermediate_size": 11008},
    "MistralForCausalLM": {**_LLAMA, "intermediate_size": 14336},
    "Gemma3ForCausalLM": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "vocab_size": 262208,
    },
    "Qwen2ForCausalLM": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 151936,
    },
}
