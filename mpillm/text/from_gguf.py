"""A tokenizer built from the tokenizer.ggml fields of a GGUF file, with the same ids as in llama.cpp.

`gpt2` is byte-level BPE with merges; the regular expressions that tokenizer.ggml.pre names split a text into words.
`llama` is SentencePiece's BPE, which merges the pair whose piece has the highest score; `gemma4` has merges instead.
Those of encoders are in `gguf_words`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mpillm.errors import ModelError
from mpillm.text.gguf_fields import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, TokenizerFields, plain
from mpillm.text.gguf_words import put_around, unigrams, word_pieces
from mpillm.text.parts import END_NAMES, TokenizerParts, checked

log = logging.getLogger(__name__)

# Word splits, applied one after the other, from llama.cpp's src/llama-vocab.cpp (MIT).
_CASE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
_QWEN2 = rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
_QWEN35 = (  # combining marks belong to words
    rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
)
_CASED_WORD = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASE}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASE}?"
)
_GPT4O = rf"{_CASED_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_MARKED_WORD = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
)
_DEEPSEEK3 = rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_THREES = r"[0-9]{1,3}(?=(?:[0-9]{3})*\b)"  # digits from the right
_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
_CASED = r"(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])", r"(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_CASE}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_CASE}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3": (r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3),
    "spark2_5": (
        r"\p{N}{1,3}",
        _HAN_KANA,
        rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "deepseek-llm": (  # letters that have a case, but for Georgian and mathematical ones
        r"[\r\n]",
        "\\s?[\\p{Lu}\\p{Lt}\\p{Ll}&&[^\u10d0-\u10ff\U0001d400-\U0001d7ff]]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "kimi-k2": (_KIMI,),
    "bailingmoe": (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, r"\p{N}"),
    "chameleon": (
        "<sentinel:[0-9]+>",
        "IMGIMG[A-I]{1,4}Z",
        r"[\t\n]|    |  ",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
    ),
    "jais-2": (
        rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
    ),
    "laguna": (r"[^\n]+|\n+", _QWEN2),
    "minicpm5": (
        r"\p{N}{1,3}",
        rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}",
    ),
    "superbpe": (r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))"),
    "tiny_aya": (_THREES, _GPT4O),
    "ufakzeka": (rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}",),
    "youtu": (
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
        f"[\u3105-\u312f]+|{_HAN_KANA}",
        rf"{_CASED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    ),
    "seed-coder": (
        rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",
    ),
}
_SAME = {
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 chatglm-bpe",
    "qwen2": "stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "gpt-2": (
        "modern-bert roberta-bpe phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 jina-es "
        "jina-de jina-v1-en jina-v2-code jina-v2-es jina-v2-de"
    ),
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "gpt-4o": "llama4 minimax-m2 kanana2 talkie granite-embed-multi-97m",
    "tiny_aya": "cohere2moe",
    "bailingmoe": "bailingmoe2 llada-moe",
    "bloom": "poro-chat gpt3-finnish",
}
_PRE = {name: name for name in _SPLITS} | {
    other: name for name, others in _SAME.items() for other in others.split()
}
# For these, llama.cpp takes a word that is a token as it is, and begins texts with BOS unless the file says otherwise;
# for the ones below it does one of both.
_WHOLE_WORDS_AND_BOS = frozenset(
    [
        "llama-bpe",
        "tekken",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
    ]
)
_WHOLE_WORDS = _WHOLE_WORDS_AND_BOS | {"granite-embed-multi-97m", "minicpm5", "youtu"}
_BEGIN = _WHOLE_WORDS_AND_BOS | {"chameleon"}

_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read(fields: Mapping[str, Any], where: str = "the GGUF file") -> TokenizerParts | None:
    """The tokenizer that GGUF metadata (plain values, or the gguf library's fields) describe; None if there is none."""
    ggml = TokenizerFields(fields, where)
    kind = ggml.get("model")
    if kind is None or kind in {"none", "no_vocab"}:
        return None
    tokens = ggml.strings("tokens")
    for id, token in enumerate(tokens):
        if not token:
            tokens[id] = f"[EMPTY_{id}]"
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise ModelError(f"The tokenizer in {where} lists the token {twice!r} twice.")
    types = ggml.numbers("token_type", int, len(tokens), NORMAL)
    for token in END_NAMES & vocab.keys():
        types[vocab[token]] = CONTROL  # some converters mark them otherwise by mistake

    if kind == "gpt2":
        core, begins = _byte_level(ggml, vocab)
    elif kind == "llama":
        scores = ggml.numbers("scores", float, len(tokens), 0.0)
        merges = merges_of_scores(tokens, scores, vocab, types)
        core, begins = _sentencepiece(ggml, tokens, vocab, merges, prefix=True), True
    elif kind == "gemma4":
        core, begins = _sentencepiece(ggml, tokens, vocab, _merges(ggml), prefix=False), True
    elif kind == "bert":
        core, begins = word_pieces(ggml, tokens, types), True
    elif kind == "t5":
        core, begins = unigrams(ggml, tokens), False
    else:
        raise ModelError(
            f"The tokenizer in {where} is of the type {kind!r}; gpt2, llama, gemma4, bert and t5 are known."
        )

    special = [token for token, type in zip(tokens, types, strict=True) if type in {CONTROL, UNKNOWN}]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own = [token for token, type in zip(tokens, types, strict=True) if type == USER_DEFINED]
    core.add_tokens([AddedToken(token, normalized=False) for token in own])

    given = {name: ggml.id(key, len(tokens)) for name, key in _IDS.items()}
    named = {name: tokens[id] for name, id in given.items() if id is not None}
    if kind == "llama":  # llama.cpp's defaults
        named = {"bos_token": tokens[1], "eos_token": tokens[2]} | named if len(tokens) > 2 else named
    if kind == "bert":
        usual = {"bos_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
        named = {name: token for name, token in usual.items() if token in vocab} | named
    ends = {id for id in (ggml.id(key, len(tokens)) for key in _END_IDS) if id is not None}
    ends |= {vocab[token] for token in END_NAMES & set(special)}
    if "eos_token" in named:
        ends.add(vocab[named["eos_token"]])
    control = set(special) | {named[name] for name in ("bos_token", "eos_token") if name in named}
    # Early files of Gemma 4 say by mistake that no text begins with BOS; llama.cpp does not believe them.
    add_bos = (kind == "gemma4" or ggml.flag("add_bos_token", begins)) and "bos_token" in named
    add_eos = ggml.flag("add_eos_token", kind == "t5") and "eos_token" in named
    reads_pairs = kind in ("bert", "t5") or ggml.flag("add_sep_token", False)
    if reads_pairs:
        _put_around(core, kind, named, add_bos, add_eos)
    return TokenizerParts(
        core=core,
        where=where,
        named=named,
        control=control,
        end_ids=frozenset(ends),
        add_bos=None if reads_pairs else add_bos,
        add_eos=None if reads_pairs else add_eos,
        templates=_templates(fields),
    )


def _put_around(core: Tokenizer, kind: str, named: Mapping[str, str], add_bos: bool, add_eos: bool) -> None:
    """The tokens around texts and pairs of them, of a model that reads pairs."""
    first, last = [named["bos_token"]] if add_bos else [], [named["eos_token"]] if add_eos else []
    between = [named["sep_token"]] if "sep_token" in named else last
    if kind == "bert":
        put_around(core, first, between, between, True)
    elif kind == "t5":  # as XLM-RoBERTa's
        put_around(core, first, last, last * 2 if first else last, False)
    else:
        put_around(core, first, last, between, False)


def _templates(fields: Mapping[str, Any]) -> dict[str, str]:
    first = "tokenizer.chat_template"
    found = {"default": plain(fields[first])} if first in fields else {}
    for key in fields:
        if key.startswith(f"{first}."):
            found[key.removeprefix(f"{first}.")] = plain(fields[key])
    return {name: template for name, template in found.items() if isinstance(template, str)}


def _byte_level(ggml: TokenizerFields, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether texts begin with BOS if the file does not say."""
    pre = ggml.get("pre")
    if pre is None:
        log.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre): 'default' is used, as llama.cpp does", ggml.where
        )
        pre = "default"
    if pre not in _PRE:
        raise ggml.wrong("pre", f"is {pre!r}, which is not known; known are {', '.join(sorted(_PRE))}")
    merges, whole_words = _merges(ggml), pre in _WHOLE_WORDS
    core = checked(
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)), ggml.where
    )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[_PRE[pre]]]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core, pre in _BEGIN


def _merges(ggml: TokenizerFields) -> list[tuple[str, str]]:
    """The pairs that are merged, the first ones first."""
    merges = []
    for merge in ggml.strings("merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ggml.wrong("merges", f"holds {merge!r}, which is no pair")
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _sentencepiece(
    ggml: TokenizerFields,
    tokens: list[str],
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    prefix: bool,
) -> Tokenizer:
    """BPE of characters with spaces as underlines; `prefix`: texts begin with one if the file does not say."""
    unknown = ggml.id("unknown_token_id", len(tokens)) or 0
    bytes_known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    core = checked(
        lambda: Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                unk_token=tokens[unknown],
                fuse_unk=True,
                byte_fallback=bytes_known,
            )
        ),
        ggml.where,
    )
    prefix = ggml.flag("add_space_prefix", prefix)
    underline = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), underline] if prefix else [underline]
    )
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return core


def merges_of_scores(
    tokens: list[str], scores: list[float], vocab: dict[str, int], types: list[int]
) -> list[tuple[str, str]]:
    """BPE merges equivalent to SentencePiece's scores: all pairs that make a piece, those of the best piece first.

    Made as in transformers' SentencePieceExtractor, but of normal pieces only, so that no text becomes a control token.
    """
    normal = {token for token, type in zip(tokens, types, strict=True) if type in {NORMAL, USER_DEFINED}}
    found = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                found.append((-scores[vocab[token]], -len(left), vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
