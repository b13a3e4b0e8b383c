"""A tokenizer built from a tokenizer file (`.t`) of Distributed-Llama, with the same ids as there.

A file has a magic number, the size of its header, pairs of a key and a value (int32), the chat template, the ends of
text, and each token with its score. What keys mean: its src/tokenizer.cpp and converter/tokenizer-writer.py. It merges
the two neighbours whose token has the highest score, over a whole text, which no pre-tokenizer cuts into words; the
tokens from BOS on are special. Files that were made of SentencePiece's have their bytes behind BOS: they are read as a
GGUF file's tokenizer of that kind.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mpillm.errors import ModelError
from mpillm.text import from_gguf
from mpillm.text.described import BYTE_OF, BYTE_TOKEN
from mpillm.text.from_gguf import merges_of_scores
from mpillm.text.gguf_fields import BYTE, CONTROL, NORMAL, UNKNOWN
from mpillm.text.parts import END_NAMES, TokenizerParts, looks_special, or_model_error

MAGIC, OLD_MAGIC = 0x567124, 0x567123  # the old one is followed by five numbers instead of keys
KEYS = (
    "version", "vocab_size", "max_token_length", "bos_id", "eos_id", "pad_id", "chat_eos_id", "chat_template",
    "chat_stop", "n_eos_tokens", "add_bos",
)  # fmt: skip
OLD_KEYS = ("vocab_size", "max_token_length", "bos_id", "eos_id", "pad_id")
CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}
FIRST_BYTE = 3  # SentencePiece's token of byte 0: it comes behind <unk>, <s> and </s>


class TokenizerFile(NamedTuple):
    """The content of a file; `ends` are the ids that end a text."""

    tokens: list[bytes]
    scores: list[float]
    bos: int
    ends: list[int]
    add_bos: bool
    template: str


def read(path: Path) -> TokenizerParts:
    """Return the tokenizer of a file; ModelError if it is not complete or not sound."""
    file = read_file(path)
    parts = _sentencepiece(file, path) if _has_byte_pieces(file.tokens) else _byte_level(file, path)
    parts.end_ids |= frozenset(file.ends)
    return parts


def template_in(path: Path) -> str:
    """Return the chat template of a file, "" if it has none; ModelError if what stands before it is not sound."""
    return _beginning(_opened(path))[2]


def _opened(path: Path) -> _TokenizerReader:
    try:
        return _TokenizerReader(path, path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def _beginning(cursor: _TokenizerReader) -> tuple[dict[str, int], list[int], str]:
    """Return the header's values, the ends of text among them, and the chat template."""
    values, ends = _header(cursor)
    cursor.take(values.get("chat_stop", 0))
    return values, ends, cursor.text(max(values.get("chat_template", 0), 0), "the chat template")


def read_file(path: Path) -> TokenizerFile:
    """Read a file; ModelError if it is not complete or not valid."""
    cursor = _opened(path)
    values, ends, template = _beginning(cursor)
    ends += cursor.numbers(values.get("n_eos_tokens", 0))
    count, bos = values.get("vocab_size", 0), values.get("bos_id", -1)
    tokens, scores = [], []
    for _ in range(count):
        score, length = struct.unpack("<fi", cursor.take(8))
        tokens.append(cursor.take(length))
        scores.append(score)
    if cursor.at < len(cursor.data):
        raise cursor.broken(f"{len(cursor.data) - cursor.at} bytes follow its {count} tokens")
    for name, id in (("bos_id", bos), *(("the end of text", id) for id in ends)):
        if not 0 <= id < count:
            raise cursor.broken(f"{name} is {id}, but there are {count} tokens")
    if not all(tokens) or not all(map(_is_number, scores)):
        raise cursor.broken("a token is empty, or its score is not a number")
    return TokenizerFile(tokens, scores, bos, ends, values.get("add_bos", 1) == 1, template)


def _header(cursor: _TokenizerReader) -> tuple[dict[str, int], list[int]]:
    """Return the header's values by their keys, and the ends of text among them."""
    (magic,) = cursor.numbers(1)
    if magic == OLD_MAGIC:
        pairs = list(zip(OLD_KEYS, cursor.numbers(len(OLD_KEYS)), strict=True))
    elif magic == MAGIC:
        (size,) = cursor.numbers(1)
        if size < 8 or size % 8:
            raise cursor.broken(f"its header has {size} bytes")
        found = cursor.numbers(size // 4 - 2)
        unknown = [key for key in found[::2] if not 0 <= key < len(KEYS)]
        if unknown:
            raise cursor.broken(f"its header has the unknown key {unknown[0]}")
        pairs = [(KEYS[key], value) for key, value in zip(found[::2], found[1::2], strict=True)]
        if (version := dict(pairs).get("version")) != 1:
            raise ModelError(
                f"{cursor.path} has version {version}; version 1 can be read: convert the tokenizer again with "
                "Distributed-Llama's newest version."
            )
    else:
        raise ModelError(f"{cursor.path} is not a tokenizer of Distributed-Llama.")
    ends = [value for key, value in pairs if key in ("eos_id", "chat_eos_id") and value >= 0]
    return dict(pairs), ends


def _byte_level(file: TokenizerFile, path: Path) -> TokenizerParts:
    """Special tokens are those from BOS on; if not all bytes lie before it, those that look so."""
    bytes_first = {bytes([byte]) for byte in range(256)} <= set(file.tokens[: file.bos])
    ends = {file.bos, *file.ends}
    words, special, own = [], [], []
    for id, token in enumerate(file.tokens):
        try:
            content = token.decode() if id >= file.bos or id in ends else ""
        except UnicodeDecodeError:
            content = ""
        if content and (id in ends or looks_special(content)):
            special.append(content)
        elif content and bytes_first:
            own.append(content)
        else:
            content = "".join(CHARACTER_OF[byte] for byte in token)
        words.append(content)
    vocab = {word: id for id, word in enumerate(words)}
    if len(vocab) < len(words):
        twice = next(word for id, word in enumerate(words) if vocab[word] != id)
        raise ModelError(f"The tokenizer in {path} lists the token {twice!r} twice.")
    if missing := CHARACTER_OF.keys() - {BYTE_OF.get(word) for word in words}:
        raise ModelError(
            f"The tokenizer in {path} has no token for the byte {min(missing):#04x}; it cannot be used."
        )
    unmerged = {*special, *own}
    types = [CONTROL if word in unmerged else NORMAL for word in words]
    core = or_model_error(
        lambda: Tokenizer(models.BPE(vocab, merges_of_scores(words, file.scores, vocab, types))), str(path)
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, normalized=False) for token in own])
    named = {"bos_token": words[file.bos]} | ({"eos_token": words[file.ends[0]]} if file.ends else {})
    return TokenizerParts(
        core=core,
        where=str(path),
        named=named,
        control=set(special),
        end_ids=frozenset(vocab[token] for token in END_NAMES & set(special)),
        add_bos=file.add_bos,
        add_eos=False,
        templates={"default": file.template} if file.template else {},
    )


def _has_byte_pieces(tokens: list[bytes]) -> bool:
    """Return whether SentencePiece's tokens for single bytes follow its first three: as bytes, or written <0x00>."""
    pieces = tokens[FIRST_BYTE : FIRST_BYTE + 256]
    return pieces == [bytes([byte]) for byte in range(256)] or (
        len(pieces) == 256 and all(BYTE_TOKEN.fullmatch(piece.decode("latin-1")) for piece in pieces)
    )


def _sentencepiece(file: TokenizerFile, path: Path) -> TokenizerParts:
    words = [token.decode("utf-8", "replace").replace(" ", "\u2581") for token in file.tokens]
    words[FIRST_BYTE : FIRST_BYTE + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [NORMAL] * len(words)
    types[0] = UNKNOWN
    types[FIRST_BYTE : FIRST_BYTE + 256] = [BYTE] * 256
    for id in (file.bos, *file.ends):
        types[id] = CONTROL
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": file.scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": file.bos,
        "tokenizer.ggml.add_bos_token": file.add_bos,
    }
    if file.ends:
        fields["tokenizer.ggml.eos_token_id"] = file.ends[0]
    if file.template:
        fields["tokenizer.chat_template"] = file.template
    parts = from_gguf.read(fields, str(path))
    assert parts is not None
    return parts


def _is_number(value: float) -> bool:
    return abs(value) < float("inf")


class _TokenizerReader:
    """Reads a file from front to back; what would lie beyond its end is a ModelError."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def broken(self, problem: str) -> ModelError:
        return ModelError(f"{self.path} is not a sound tokenizer file: {problem}; fetch or convert it again.")

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise self.broken(f"it ends too early ({len(self.data)} bytes)")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, count: int) -> list[int]:
        if count < 0:
            raise self.broken(f"it announces {count} numbers")
        return list(struct.unpack(f"<{count}i", self.take(4 * count)))

    def text(self, length: int, what: str) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None
