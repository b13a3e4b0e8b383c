"""The tokenizers of encoders in GGUF files: WordPiece (`bert`) and SentencePiece's unigrams (`t5`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mpillm.text.gguf_fields import CONTROL, UNKNOWN, TokenizerFields
from mpillm.text.parts import or_model_error

SPACE = "\u2581"  # with which the pieces begin that begin a word


def word_pieces(ggml: TokenizerFields, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    """BERT's WordPiece; converters mark the pieces that begin a word, and BERT those that do not (##).

    Where a file does not say it, text is written in small letters if all words of the vocabulary are.
    """
    vocab = {_piece(token, type): id for id, (token, type) in enumerate(zip(tokens, types, strict=True))}
    if len(vocab) != len(tokens):
        raise ggml.wrong("tokens", "has two tokens for one piece of a word")
    unknown = ggml.id("unknown_token_id", len(tokens))
    name = "[UNK]" if unknown is None else tokens[unknown]
    core = or_model_error(lambda: Tokenizer(models.WordPiece(vocab, unk_token=name)), ggml.where)
    small = ggml.flag(
        "normalizer.lowercase", all(token == token.lower() for token in tokens if token[:1] != "[")
    )
    accents = ggml.get("normalizer.strip_accents")  # else they go where letters become small
    core.normalizer = normalizers.BertNormalizer(lowercase=small, strip_accents=accents)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def unigrams(ggml: TokenizerFields, tokens: list[str]) -> Tokenizer:
    """Unigrams with their scores; characters are replaced as the file's table says."""
    scores = ggml.numbers("scores", float, len(tokens), 0.0)
    unknown = ggml.id("unknown_token_id", len(tokens))
    pieces = list(zip(tokens, scores, strict=True))
    core = or_model_error(
        lambda: Tokenizer(models.Unigram(pieces, 2 if unknown is None else unknown, False)), ggml.where
    )
    if table := ggml.values("precompiled_charsmap"):
        raw = np.array(table).astype(np.uint8).tobytes()
        core.normalizer = or_model_error(lambda: normalizers.Precompiled(raw), ggml.where)
    prefix = "always" if ggml.flag("add_space_prefix", True) else "never"
    words = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prefix)
    merged = ggml.flag("remove_extra_whitespaces", True)
    core.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words]) if merged else words
    )
    core.decoder = decoders.Metaspace(SPACE, prepend_scheme=prefix)
    return core


def put_around(
    core: Tokenizer, first: list[str], last: list[str], between: list[str], segments: bool
) -> None:
    """Tokens stand around texts and `between` two of them; the second may be a segment of its own."""
    second = ":1" if segments else ""
    used = dict.fromkeys((*first, *between, *last))
    core.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *between, f"$B{second}", *(token + second for token in last)],
        special_tokens=[(token, core.token_to_id(token)) for token in used],
    )


def _piece(token: str, type: int) -> str:
    """Return a token as BERT's vocabulary has it."""
    if type in (CONTROL, UNKNOWN) or (token[:1] == "[" and token[-1:] == "]" and len(token) > 2):
        return token
    return token[1:] if token.startswith(SPACE) else "##" + token
