"""Tokenizers of Distributed-Llama (`.t`): the ids that its own algorithm gives, and files that are damaged."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.text import Tokenizer, load_tokenizer
from tests.text.strings import STRINGS
from tests.weights.dllama_files import tokens_of, write_tokenizer

CHAT = Path(__file__).parents[1] / "fixtures/models/chat"
TEMPLATE = json.loads((CHAT / "tokenizer_config.json").read_text())["chat_template"].encode()


def own_ids(text: bytes, tokens: list[bytes], scores: list[float], bos: int) -> list[int]:
    """What Distributed-Llama makes of a text without special tokens, pair by pair (its src/tokenizer.cpp)."""
    regular = {token: id for id, token in enumerate(tokens[:bos])}
    ids = [regular[bytes([byte])] for byte in text]
    while True:
        best, at = -1e10, -1
        for i, (left, right) in enumerate(itertools.pairwise(ids)):
            id = regular.get(tokens[left] + tokens[right])
            if id is not None and scores[id] > best:
                best, at = scores[id], i
        if at < 0:
            return ids
        ids[at : at + 2] = [regular[tokens[ids[at]] + tokens[ids[at + 1]]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, bos, eos = tokens_of(CHAT)
    path = tmp_path_factory.mktemp("t") / "dllama_tokenizer_tiny.t"
    return write_tokenizer(path, tokens, bos, [eos], template=TEMPLATE)


def load(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


def test_ids_are_its_own(tiny: Path) -> None:
    """Words are not cut apart before, so that "the, " may be one token; BOS comes first where the file says so."""
    tokenizer = load(tiny)
    tokens, bos, eos = tokens_of(CHAT)
    scores = [-float(id) for id in range(len(tokens))]
    for text in (*STRINGS, "the quick brown fox, and the other dogs.", "a" * 40, " " * 33):
        assert tokenizer.encode(text) == [bos, *own_ids(text.encode(), tokens, scores, bos)]
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    assert tokenizer.end_ids == {eos}
    assert tokenizer.is_control(bos)
    assert tokenizer.encode("<s></s>", add_special=False, parse_special=True) == [bos, eos]


def test_scores_decide_and_not_ids(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ab", b"bc", b"abc", b"cab", b"aa", b"aaa", b"bca", b"  ", b" a", b"b ", b"<s>", b"<think>"]
    bos = tokens.index(b"<s>")
    scores = random.permutation(len(tokens)).astype(float).tolist()
    tokenizer = load(write_tokenizer(tmp_path / "t.t", tokens, bos, [], scores, add_bos=False))
    for length in (1, 3, 8, 30):
        for _ in range(20):
            text = "".join(random.choice(list("abc "), length))
            assert tokenizer.encode(text) == own_ids(text.encode(), tokens, scores, bos)
    assert tokenizer.encode("<think>") == [bos + 1]  # a word like others: it does not structure a text


def test_chats(tiny: Path) -> None:
    tokenizer = load(tiny)
    shown = tokenizer.render_chat([{"role": "user", "content": "what is"}])
    assert shown == "<s><|user|>what is</s><|assistant|>"
    ids = tokenizer.encode_chat([{"role": "user", "content": "<s>"}])
    assert ids.count(tokenizer.bos_id) == 1


def test_pieces_of_sentencepiece_with_bytes_behind_bos(tmp_path: Path) -> None:
    """Both converters: one writes the tokens of bytes as such, the other their names."""
    texts = ["▁", "a", "b", "ab", "▁ab", "é"]
    for name in (False, True):
        tokens = [b"<unk>", b"<s>", b"</s>"]
        tokens += [f"<0x{byte:02X}>".encode() if name else bytes([byte]) for byte in range(256)]
        tokens += [text.replace("▁", " ").encode() for text in texts]
        scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -13.0]
        tokenizer = load(write_tokenizer(tmp_path / "s.t", tokens, 1, [2], scores))
        assert tokenizer.encode("ab ab") == [1, 263, 263]
        assert tokenizer.encode("é!") == [1, 259, 264, 3 + ord("!")]
        assert tokenizer.decode(tokenizer.encode("aé!", add_special=False)) == "aé!"
        assert tokenizer.end_ids == {2}


def test_old_files_and_old_keys(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"<s>", b"</s>"]
    listed = b"".join(struct.pack("<fi", -float(id), len(token)) + token for id, token in enumerate(tokens))
    old = tmp_path / "old.t"
    old.write_bytes(struct.pack("<6i", 0x567123, len(tokens), 4, 256, 257, -1) + listed)
    assert load(old).encode("b") == [256, ord("b")]
    path = write_tokenizer(
        tmp_path / "t.t", tokens, 256, [], eos_id=257, chat_eos_id=256, pad_id=-1, chat_stop=5
    )
    assert load(path).end_ids == {256, 257}


def test_broken_files(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "broken.t"
    for stop in (0, 3, 4, 7, 8, 20, 60, 70, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:stop])
        with pytest.raises(ModelError, match=r"broken\.t is not a sound tokenizer file: it ends too early"):
            load(path)
    path.write_bytes(data + b"!")
    with pytest.raises(ModelError, match="1 bytes follow its 320 tokens"):
        load(path)
    path.write_bytes(b"GGUF" + data)
    with pytest.raises(ModelError, match="is not a tokenizer of Distributed-Llama"):
        load(path)
    bytes_of = [bytes([byte]) for byte in range(256)]
    for tokens, bos, ends, more, words in (
        ([*bytes_of, b"<s>"], 257, [], {}, "bos_id is 257, but there are 257 tokens"),
        ([*bytes_of, b"<s>"], 256, [-1], {}, "the end of text is -1, but there are 257 tokens"),
        ([*bytes_of, b"<s>"], 256, [], {"version": 2}, "has version 2; version 1 can be read"),
        ([*bytes_of, b"a", b"<s>"], 257, [], {}, "lists the token 'a' twice"),
        ([*bytes_of[1:], b"<s>"], 255, [], {}, "has no token for the byte 0x00"),
        ([*bytes_of, b"", b"<s>"], 257, [], {}, "a token is empty"),
        ([*bytes_of, b"<s>"], 256, [], {"vocab_size": -1}, "bytes follow its -1 tokens"),
        ([*bytes_of, b"<s>"], 256, [], {"n_eos_tokens": 2**31 - 1}, "it ends too early"),
    ):
        write_tokenizer(path, tokens, bos, ends, **more)
        with pytest.raises(ModelError, match=words):
            load(path)
    random = np.random.default_rng(6)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(random.integers(0, 80))] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load(path)
        except ModelError:
            continue
