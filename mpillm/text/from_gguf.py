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
from mpillm.text.gguf_splits import BEGIN, SPLIT_OF, SPLITS, WHOLE_WORDS
from mpillm.text.gguf_words import put_around, unigrams, word_pieces
from mpillm.text.parts import END_NAMES, TokenizerParts, or_model_error

log = logging.getLogger(__name__)


_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read(fields: Mapping[str, Any], where: str = "the GGUF file") -> TokenizerParts | None:
    """Return the tokenizer that GGUF metadata (plain values, or the gguf library's fields) describe; None if none."""
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

    core, begins = _core(ggml, kind, tokens, vocab, types)
    special = [token for token, type in zip(tokens, types, strict=True) if type in {CONTROL, UNKNOWN}]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own = [token for token, type in zip(tokens, types, strict=True) if type == USER_DEFINED]
    core.add_tokens([AddedToken(token, normalized=False) for token in own])

    named = _named(ggml, kind, tokens, vocab)
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


def _core(
    ggml: TokenizerFields, kind: object, tokens: list[str], vocab: dict[str, int], types: list[int]
) -> tuple[Tokenizer, bool]:
    """Return the tokenizer of this kind, and whether texts begin with BOS if the file does not say."""
    if kind == "gpt2":
        return _byte_level(ggml, vocab)
    if kind == "llama":
        merges = merges_of_scores(tokens, ggml.numbers("scores", float, len(tokens), 0.0), vocab, types)
        return _sentencepiece(ggml, tokens, vocab, merges, prefix=True), True
    if kind == "gemma4":
        return _sentencepiece(ggml, tokens, vocab, _merges(ggml), prefix=False), True
    if kind == "bert":
        return word_pieces(ggml, tokens, types), True
    if kind == "t5":
        return unigrams(ggml, tokens), False
    raise ModelError(
        f"The tokenizer in {ggml.where} is of the type {kind!r}; gpt2, llama, gemma4, bert and t5 are known."
    )


def _named(ggml: TokenizerFields, kind: object, tokens: list[str], vocab: dict[str, int]) -> dict[str, str]:
    """Return the special tokens by their names in `transformers`, with llama.cpp's defaults."""
    given = {name: ggml.id(key, len(tokens)) for name, key in _IDS.items()}
    named = {name: tokens[id] for name, id in given.items() if id is not None}
    if kind == "llama" and len(tokens) > 2:
        return {"bos_token": tokens[1], "eos_token": tokens[2]} | named
    if kind == "bert":
        usual = {"bos_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
        return {name: token for name, token in usual.items() if token in vocab} | named
    return named


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
    """Return the tokenizer, and whether texts begin with BOS if the file does not say."""
    pre = ggml.get("pre")
    if pre is None:
        log.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre): 'default' is used, as llama.cpp does", ggml.where
        )
        pre = "default"
    if pre not in SPLIT_OF:
        raise ggml.wrong("pre", f"is {pre!r}, which is not known; known are {', '.join(sorted(SPLIT_OF))}")
    merges, whole_words = _merges(ggml), pre in WHOLE_WORDS
    core = or_model_error(
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)), ggml.where
    )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[SPLIT_OF[pre]]]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core, pre in BEGIN


def _merges(ggml: TokenizerFields) -> list[tuple[str, str]]:
    """Return the pairs that are merged, the first ones first."""
    merges = []
    for merge in ggml.strings("merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ggml.wrong("merges", f"holds {merge!r}, which is not a pair")
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
    core = or_model_error(
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
