"""The families of models that can be run, one file each, and the table of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.afmoe import Afmoe
from mpillm.model.families.base import Family
from mpillm.model.families.bert import Bert, Roberta
from mpillm.model.families.cohere import Cohere
from mpillm.model.families.cwm import Cwm
from mpillm.model.families.deepseek import DeepSeek, Youtu
from mpillm.model.families.dots import Dots
from mpillm.model.families.ernie import Ernie
from mpillm.model.families.exaone import Exaone, ExaoneMixture
from mpillm.model.families.falcon import Falcon
from mpillm.model.families.falcon_h1 import FalconH1
from mpillm.model.families.gemma import FirstGemma, Gemma
from mpillm.model.families.gemma4 import Gemma4
from mpillm.model.families.glm import Glm, GlmMixture
from mpillm.model.families.gpt2 import BigCode, Gpt2, Opt
from mpillm.model.families.gpt_oss import GptOss
from mpillm.model.families.granite import Granite, GraniteSwa
from mpillm.model.families.granite_hybrid import GraniteHybrid
from mpillm.model.families.helium import Helium
from mpillm.model.families.hunyuan import Hunyuan
from mpillm.model.families.images import TEXT_SIZES, WITH_IMAGES
from mpillm.model.families.lfm2 import Lfm2
from mpillm.model.families.llama import Llama
from mpillm.model.families.llama4 import Llama4
from mpillm.model.families.mamba2 import Mamba2Family
from mpillm.model.families.minicpm import MiniCpm3
from mpillm.model.families.minimax import MiniMax
from mpillm.model.families.mistral import Mistral
from mpillm.model.families.modernbert import ModernBert
from mpillm.model.families.nemotron_h import NemotronH
from mpillm.model.families.neox import FirstPhi, NeoX, StableLm
from mpillm.model.families.nomic_bert import NomicBert
from mpillm.model.families.olmo import FlexOlmo, Olmo, Olmoe
from mpillm.model.families.phi import Phi
from mpillm.model.families.qwen import Qwen, QwenVlMixture
from mpillm.model.families.qwen_next import QwenNext
from mpillm.model.families.seed import Seed
from mpillm.model.families.smollm import SmolLM3
from mpillm.model.families.starcoder import StarCoder
from mpillm.model.families.tasks import Task, split_task
from mpillm.model.families.ungated import Arcee, Ungated
from mpillm.model.fields import Fields

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen(),
    QwenVlMixture(),
    DeepSeek(),
    Youtu(),
    MiniCpm3(),
    QwenNext(),
    Llama4(),
    FirstGemma(),
    Gemma(),
    Gemma4(),
    Glm(),
    GlmMixture(),
    GptOss(),
    Granite(),
    GraniteSwa(),
    GraniteHybrid(),
    Olmo(),
    Olmoe(),
    FlexOlmo(),
    StarCoder(),
    SmolLM3(),
    Seed(),
    MiniMax(),
    Exaone(),
    ExaoneMixture(),
    Ernie(),
    Dots(),
    Cohere(),
    Phi(),
    Hunyuan(),
    Gpt2(),
    BigCode(),
    Opt(),
    NeoX(),
    FirstPhi(),
    StableLm(),
    Arcee(),
    Ungated(),
    Cwm(),
    Helium(),
    Afmoe(),
    Lfm2(),
    Falcon(),
    FalconH1(),
    NemotronH(),
    Mamba2Family(),
    Bert(),
    Roberta(),
    ModernBert(),
    NomicBert(),
)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_PUBLISHED = {  # what files call a class, where transformers has another name
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
}
_BY_GGUF = {kind: family for family in FAMILIES for kind in family.gguf}
MODEL_TYPES: dict[str, str] = {
    model_type: name for family in FAMILIES for name, model_type in family.architectures.items()
} | {model_type: name for family in FAMILIES for model_type, name in family.model_types.items()}

LISTED = "mpillm models --architectures lists those that are supported"


def family_of(config: Mapping[str, Any], name: str) -> tuple[Family, str, Task]:
    """Return the family of a configuration with Hugging Face's keys, the class of its layers and its task.

    ModelError if there is none.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"{name}: expected an object with the model's configuration.")
    named, model_type = config.get("architectures"), config.get("model_type")
    if named is None:
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ModelError(f"{name}: architectures is missing; {LISTED}.")
        named = [MODEL_TYPES[model_type]]
    elif not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ModelError(f"{name}: architectures must be a list of one name; {LISTED}.")
    named = [_PUBLISHED.get(named[0], named[0])]
    if named[0] in WITH_IMAGES:
        text = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
        if text is None:
            raise ModelError(
                f"{name}: the text part of {named[0]} has model_type {str(model_type)[:60]!r}, which "
                f"{_unsupported(str(model_type), MODEL_TYPES)}"
            )
        return _BY_ARCHITECTURE[text], text, "generate"
    found = split_task(named[0], _BY_ARCHITECTURE)
    if found is None:
        raise ModelError(f"{name}: architecture {named[0][:60]!r} {_unsupported(named[0], architectures())}")
    architecture, task = found
    if task == "classify" and (config.get("is_original_qwen3_reranker") or config.get("method")):
        task = "generate"  # as vLLM is told of a model that answers in words: rows of its LM head classify
    if model_type is not None and (
        not isinstance(model_type, str) or MODEL_TYPES.get(model_type) != architecture
    ):
        raise ModelError(f"{name}: model_type {str(model_type)[:60]!r} does not belong to {named[0]}.")
    return _BY_ARCHITECTURE[architecture], architecture, task


def architectures() -> list[str]:
    """Return the names that `architectures` of a config.json may have, except other tasks' classes of these layers."""
    return [*_BY_ARCHITECTURE, *sorted(WITH_IMAGES)]


def gguf_architectures() -> list[str]:
    """Return the names that `general.architecture` of a GGUF file may have."""
    return list(_BY_GGUF)


def _unsupported(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about something unsupported: up to three similar names among the `known` ones."""
    stems = {_stem(one): one for one in reversed(list(known))}  # the first of several
    similar = [stems[stem] for stem in get_close_matches(_stem(name), stems, cutoff=0.7)]
    like = f"similar ones that are: {', '.join(similar)}; " if similar else ""
    return f"is not supported; {like}{LISTED}."


def _stem(name: str) -> str:
    """Return a class's name without what nearly all of them end in."""
    return re.sub(r"(For[A-Z]\w+|LMHeadModel|Model)$", "", name).lower()


def gguf_family(kind: Any, name: str) -> Family:
    """Return the family of a GGUF file by its general.architecture; ModelError if there is none."""
    if not isinstance(kind, str) or kind not in _BY_GGUF:
        if kind is None:
            raise ModelError(f"{name} has no architecture; {LISTED}.")
        raise ModelError(
            f"{name} has architecture {str(kind)[:60]!r}, which {_unsupported(str(kind), _BY_GGUF)}"
        )
    return _BY_GGUF[kind]


def read_config(config: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """Return the model of a configuration with Hugging Face's keys; `name` is how error messages call it.

    Absent keys mean what transformers' configuration classes say. What is not known is refused by name: a key that is
    neither read nor known to be harmless might change the result.
    """
    family, architecture, task = family_of(config, name)
    defaults, named = family.defaults[architecture], config.get("architectures")
    if named and named[0] in WITH_IMAGES:
        defaults = {**TEXT_SIZES.get(architecture, {}), **defaults}
    fields = Fields(config, name, defaults)
    fields.read |= {"architectures", "model_type"}
    classifier = family.classifier(fields) if task == "classify" else None
    found = family.config(fields, architecture)
    shown = named[0] if named else found.architecture
    if task == "generate" and found.whole_prompts:
        raise ModelError(
            f"{name}: {shown} is an encoder, which generates no text; it runs as a {found.architecture}."
        )
    return replace(found, architecture=shown, generates=task == "generate", classifier=classifier)
