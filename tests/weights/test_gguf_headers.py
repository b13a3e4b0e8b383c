"""The headers of GGUF files, sound, damaged and hostile."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import ModelError
from mpillm.model.opening import open_source
from mpillm.weights.formats.gguf_header import _Cursor, read_header
from mpillm.weights.io.mapped import MappedFile
from tests.weights.build import Tiny, write_gguf

U32, STRING, ARRAY = 4, 8, 9


def header_of(path: Path):
    file = MappedFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


@pytest.mark.parametrize("alignment", [32, 256])
def test_header_agrees_with_the_library(tmp_path, alignment):
    extra = {"general.tags": ["a", "", "\u4e2d"], "general.x": [1.5, 2.5], "general.y": [True]}
    path = write_gguf(
        tmp_path / "m.gguf", Tiny(), types=("Q4_1", "F16", "Q5_0"), extra=extra, alignment=alignment
    )
    header, library = header_of(path), gguf.GGUFReader(path)
    fields = {
        name: field.contents() for name, field in library.fields.items() if not name.startswith("GGUF.")
    }
    assert header.metadata == fields
    assert list(header.tensors) == [tensor.name for tensor in library.tensors]
    for tensor in library.tensors:
        mine = header.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.stored.name, mine.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert mine.offset == tensor.data_offset


@pytest.mark.parametrize(
    ("words", "at_once"),
    [
        (["a", "", "\u4e2d", "b" * 100] * 9, True),
        (["a", "b" * 256, "c"] * 99, False),  # a length of two bytes
        (["a", "b\0c", "d"], False),
        (["b" * 200] * 3, False),
    ],
)
def test_short_strings_are_decoded_at_once(tmp_path, monkeypatch, words, at_once):
    values = b"".join(text(word.encode()) for word in words)
    strings = field(b"s", ARRAY, struct.pack("<IQ", STRING, len(words)) + values)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([strings], data=4096))
    one_by_one = []
    read = _Cursor._strings
    monkeypatch.setattr(_Cursor, "_strings", lambda *given: one_by_one.append(1) or read(*given))
    assert header_of(tmp_path / "m.gguf").metadata == {"s": words}
    assert bool(one_by_one) != at_once


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(fields=(), tensors=(), version=3, n_fields=None, n_tensors=None, data=64) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(fields) if n_fields is None else n_fields)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data if data else 0)


REFUSED = {
    "magic": (b"GGUX" + bytes(40), "is not a GGUF file"),
    "short": (b"GGUF", "is not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "has GGUF version 1; versions 2 and 3 can be read"),
    "version 4": (gguf_bytes(version=4), "has GGUF version 4"),
    "big endian": (gguf_bytes(version=3 << 24), "is a big-endian GGUF file"),
    "fields": (gguf_bytes(n_fields=2**60), f"it announces {2**60} metadata fields"),
    "tensors": (gguf_bytes(n_tensors=2**63), f"and {2**63} tensors"),
    "fields missing": (
        gguf_bytes([field(b"a", U32, bytes(4))], n_fields=2, data=0),
        "its header reaches beyond its end",
    ),
    "tensors missing": (gguf_bytes(n_tensors=9), "has 0 dimensions"),
    "name length": (gguf_bytes([struct.pack("<Q", 2**62)]), f"a metadata field has a length of {2**62}"),
    "name end": (gguf_bytes([struct.pack("<Q", 2**20)]), "its header reaches beyond its end"),
    "name text": (gguf_bytes([field(b"\xff", U32, bytes(4))]), "the name of a metadata field is not UTF-8"),
    "twice": (gguf_bytes([field(b"a", U32, bytes(4))] * 2), "metadata field 'a' occurs twice"),
    "type": (gguf_bytes([field(b"a", 13, bytes(4))]), "metadata field 'a' has the unknown type 13"),
    "string": (gguf_bytes([field(b"a", STRING, struct.pack("<Q", 2**40))]), f"has a length of {2**40} bytes"),
    "nested": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "'a' is an array of arrays"),
    "items": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 0, 2**40))]), f"announces {2**40} items"),
    "item type": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 77, 1))]), "'a' has the unknown type 77"),
    "numbers": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 10, 2**20))]), "reaches beyond its end"),
    "strings": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", STRING, 2**20))]),
        "more than the file can hold",
    ),
    "a string": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 2, 2**50))]),
        "'a' reaches beyond the end of the file",
    ),
    "last string": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 2, 20) + bytes(20))], data=0),
        "'a' reaches beyond the end of the file",
    ),
    "string text": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff")]),
        "is not UTF-8",
    ),
    "alignment": (
        gguf_bytes([field(b"general.alignment", U32, struct.pack("<I", 24))]),
        "alignment is 24, which is",
    ),
    "alignment 0": (gguf_bytes([field(b"general.alignment", U32, bytes(4))]), "alignment is 0, which is"),
    "alignment type": (
        gguf_bytes([field(b"general.alignment", STRING, text(b"32"))]),
        "alignment is 32, which is",
    ),
    "dims": (gguf_bytes(tensors=[tensor(b"t", (1,) * 5)]), "tensor 't' has 5 dimensions"),
    "no dims": (gguf_bytes(tensors=[tensor(b"t", ())]), "tensor 't' has 0 dimensions"),
    "many dims": (
        gguf_bytes(tensors=[text(b"t") + struct.pack("<I", 2**32 - 1)]),
        "tensor 't' has 4294967295 dimensions",
    ),
    "size": (gguf_bytes(tensors=[tensor(b"t", (2**32, 2**32))]), "has the impossible shape"),
    "block type": (
        gguf_bytes(tensors=[tensor(b"t", kind=99)]),
        "tensor 't' has block type 99, which is unknown",
    ),
    "removed type": (
        gguf_bytes(tensors=[tensor(b"t", kind=4)]),
        "block type 4, which is unknown or cannot be",
    ),
    "integers": (
        gguf_bytes(tensors=[tensor(b"t", kind=26)]),
        "block type 26, which is unknown or cannot be decoded",
    ),
    "blocks": (gguf_bytes(tensors=[tensor(b"t", (48, 2), 2)]), "rows of 48 values, not whole blocks of Q4_0"),
    "offset": (gguf_bytes(tensors=[tensor(b"t", offset=4)]), "offset of tensor 't' is not a multiple of 32"),
    "beyond": (gguf_bytes(tensors=[tensor(b"t", offset=64)]), "tensor 't' reaches beyond its end"),
    "far": (gguf_bytes(tensors=[tensor(b"t", offset=2**64 - 32)]), "tensor 't' reaches beyond its end"),
    "overlap": (
        gguf_bytes(tensors=[tensor(b"t", (9,)), tensor(b"u", offset=32)], data=96),
        "tensor 'u' overlaps another one",
    ),
    "tensor twice": (
        gguf_bytes(tensors=[tensor(b"t"), tensor(b"t", offset=32)]),
        "tensor 't' occurs twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_hostile_headers(tmp_path, case):
    data, words = REFUSED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as error:
        open_source(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_no_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    with pytest.raises(
        ModelError, match="has no architecture; mpillm models --architectures lists those that are supported"
    ):
        open_source(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    extra = {"tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5, 1.5]}
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    model = Tiny(hidden=32, n_layers=1, n_heads=2, n_kv_heads=1, intermediate=32, vocab=8)
    return write_gguf(path, model, types=("Q8_0", "F32"), extra=extra).read_bytes()


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_sound(tmp_path_factory, sound, data):
    """Whatever bits flip in the header, and wherever the file ends: a ModelError, or tensors inside the file."""
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, 1500))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged))) :]
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(damaged)
    try:
        source = open_source(path)
    except ModelError:
        return
    for key, info in source.tensors.items():
        if len(info.shape) == 2:
            source.read(key)
        source.read_f32(key)
    source.close()


def test_a_file_of_a_hugging_face_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=f"is not a GGUF file; the model is its directory, {tmp_path}"):
        header_of(tmp_path / "config.json")
