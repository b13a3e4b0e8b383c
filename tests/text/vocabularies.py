"""The fixtures' vocabularies as GGUF fields and files, and as Hugging Face directories in the styles of real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

DATA = Path(__file__).parent / "data"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>"]
OWN = ["<think>", "</think>", "<tool_call>"]
PRES = [
    "default",
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "smollm",
    "tekken",
    "gpt-4o",
    "falcon",
    "deepseek-coder",
    "deepseek-v3",
]
PRES += [
    "seed-coder",
    "dbrx",
    "lfm2",
    "deepseek-llm",
    "kimi-k2",
    "bailingmoe",
    "exaone-moe",
    "bloom",
    "viking",
    "spark2_5",
    "chameleon",
    "jais-2",
    "laguna",
    "minicpm5",
    "superbpe",
    "tiny_aya",
    "ufakzeka",
    "youtu",
    "granite-embed-multi-97m",
]


def data(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def byte_level_fields(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary with control and user-defined tokens at its end, as GGUF metadata."""
    trained = data("byte_level.json")
    tokens = [*trained["tokens"], *CONTROL, *OWN]
    at = len(trained["tokens"])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": trained["merges"],
        "tokenizer.ggml.token_type": [1] * at + [3] * len(CONTROL) + [4] * len(OWN),
        "tokenizer.ggml.bos_token_id": at,
        "tokenizer.ggml.eos_token_id": at + 2,
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
    }


def sentencepiece_fields(prefix: bool) -> dict[str, Any]:
    trained = data("sentencepiece.json")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": trained["tokens"],
        "tokenizer.ggml.scores": trained["scores"],
        "tokenizer.ggml.token_type": trained["types"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def gemma4_fields() -> dict[str, Any]:
    """The pieces of `sentencepiece_fields` with merges in place of scores, and runs of newlines as tokens."""
    from mpillm.text.from_gguf import merges_of_scores

    trained = data("sentencepiece.json")
    tokens, types = trained["tokens"], trained["types"]
    merges = merges_of_scores(
        tokens, trained["scores"], {token: id for id, token in enumerate(tokens)}, types
    )
    runs = ["\n" * count for count in (1, 2, 3)]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*tokens, *runs],
        "tokenizer.ggml.merges": [*map(" ".join, merges), "\n \n", "\n\n \n"],
        "tokenizer.ggml.token_type": [*types, *[1] * len(runs)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }


ALL: dict[str, Callable[[], dict[str, Any]]] = {
    **{pre: partial(byte_level_fields, pre) for pre in PRES},
    "llama": partial(sentencepiece_fields, True),
    "llama-noprefix": partial(sentencepiece_fields, False),
    "gemma4": gemma4_fields,
}


def write_gguf(
    path: Path, fields: dict[str, Any], tensors: Callable[[int], dict[str, Any]] | None = None
) -> None:
    """A GGUF file with these fields, and (for llama.cpp, which wants some) tensors for a vocabulary's size."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in (tensors(len(fields["tokenizer.ggml.tokens"])) if tensors else {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_level(words: str, bos: str | None, whole: bool, form: bool) -> Tokenizer:
    trained = data("byte_level.json")
    merges = [tuple(merge.split(" ")) for merge in trained["merges"]]
    vocab = {token: id for id, token in enumerate(trained["tokens"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    if form:
        core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(words), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in OWN])
    if bos:
        first = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
        core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def _llama(legacy: bool) -> Tokenizer:
    """As Llama 2 has it: merges from scores, a space before the text (and, legacy, after each special token)."""
    from mpillm.text.from_gguf import merges_of_scores

    trained = data("sentencepiece.json")
    tokens, types = trained["tokens"], trained["types"]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = merges_of_scores(tokens, trained["scores"], vocab, types)
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [token for token, type in zip(tokens, types, strict=True) if type in (2, 3)]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens(
        [AddedToken(token, normalized=False) for token, type in zip(tokens, types, strict=True) if type == 4]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return core


_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

# style: (tokenizer, tokenizer_config.json)
STYLES: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "qwen2": (
        partial(_byte_level, _QWEN, None, False, True),
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "llama3": (
        partial(_byte_level, _LLAMA3, "<|endoftext|>", True, False),
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    ),
    "mistral": (
        partial(_byte_level, _LLAMA3, None, True, False),
        {
            "bos_token": {"content": "<s>", "special": True, "__type": "AddedToken"},
            "eos_token": "</s>",
            "add_bos_token": True,
        },
    ),
    "llama2": (partial(_llama, True), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "llama2new": (
        partial(_llama, False),
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": True,
        },
    ),
}


def write_directory(folder: Path, style: str, template: str | None = None, **more: Any) -> Path:
    """A Hugging Face directory's tokenizer files; `more` goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    make, config = STYLES[style]
    make().save(str(folder / "tokenizer.json"))
    config = (
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config | more
    )
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
