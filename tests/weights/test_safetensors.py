from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpillm.errors import ModelError
from mpillm.weights.formats.safetensors import read_header
from mpillm.weights.io.mapped import MappedFile


def header_of(path: Path):
    file = MappedFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["float32", "float16", "int64", "uint8"]), st.lists(st.integers(0, 5), max_size=4)
        ),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_reads_what_the_library_writes(tmp_path_factory, tensors, random):
    arrays = {
        name: np.frombuffer(random.randbytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            shape
        )
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.mktemp("st") / "m.safetensors"
    data = save(arrays, {"note": "x"})
    path.write_bytes(data)
    header = header_of(path)
    assert header.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = header[name]
        assert tensor.shape == array.shape
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A, B = entry(), entry(offsets=(8, 16))
REFUSED = {
    "no header": b"\x01\x02",
    "not JSON": b"{nonsense",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "huge number": b'{"a": {"shape": [' + b"9" * 10_000 + b"]}}",
    "not an object": b"[1]",
    "twice": b'{"a": 1, "a": 2}',
    "twice inside": b'{"a": {"dtype": "F32", "dtype": "F16"}}',
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "no object": {"a": [0, 8]},
    "an object as a list": {"a": ["F32", [4], [0, 16]]},
    "dtype": {"a": entry(dtype="F33")},
    "dtype type": {"a": entry(dtype=["F32"])},
    "dtype as an object": {"a": entry(dtype={"F32": None}, shape=(4,), offsets=(0, 16))},
    "shape": {"a": entry(shape=(-2,))},
    "shape type": {"a": entry(shape=(2.0,))},
    "shape bool": {"a": entry(shape=(True, 2))},
    "shape size": {"a": entry(shape=(2**40, 2**40))},
    "offsets": {"a": entry(offsets=(0, 8, 16))},
    "offsets backwards": {"a": entry(offsets=(8, 0))},
    "offsets size": {"a": entry(offsets=(0, 12))},
    "half bytes": {"a": entry("F4", (3,), (0, 1))},
    "overlap": {"a": A, "b": entry(offsets=(4, 12))},
    "same": {"a": A, "b": A},
    "gap": {"a": A, "b": entry(offsets=(12, 20))},
    "gap first": {"a": entry(offsets=(4, 12))},
    "truncated": {"a": A, "b": B, "c": entry(offsets=(16, 24))},
    "left over": {"a": A},
    "metadata": {"__metadata__": {"a": 1}, "a": A, "b": B},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    header = REFUSED[case]
    path = tmp_path / "m.safetensors"
    if case == "no header":
        path.write_bytes(header)
    else:
        written(path, header, b"\0" * 16)
    with pytest.raises(ModelError) as error:
        header_of(path)
    sentence = (
        rf"{re.escape(str(path))} is not a sound safetensors file: [^\n]{{8,200}}; fetch the model again\."
    )
    assert re.fullmatch(sentence, str(error.value))


def test_says_which_tensor(tmp_path):
    path = written(tmp_path / "m.safetensors", {"a": A, "wrong": entry(offsets=(12, 20))}, bytes(20))
    with pytest.raises(ModelError, match="wrong"):
        header_of(path)


def test_takes_the_last_of_equal_names_as_the_library_does(tmp_path):
    text = f'{{"a": {json.dumps(A)}, "a": {json.dumps(entry(shape=(4,), offsets=(0, 16)))}}}'
    path = written(tmp_path / "m.safetensors", text.encode(), bytes(16))
    assert header_of(path)["a"].shape == (4,)


def test_a_file_that_goes_away(tmp_path):
    path = written(tmp_path / "m.safetensors", {"a": A}, bytes(8))
    file = MappedFile(path)
    path.unlink()
    with pytest.raises(ModelError, match=r"m\.safetensors cannot be read: "):
        read_header(file)
    file.close()


def test_refuses_long_headers(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (2**63, 100_000_000):
        written(path, b" " * 100, length=length)
        with pytest.raises(ModelError, match=r"is not a sound safetensors file: .*header"):
            header_of(path)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ModelError, match="is empty; fetch the model again"):
        MappedFile(tmp_path / "empty")
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        MappedFile(tmp_path / "none")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        MappedFile(tmp_path)


@given(st.data())
def test_damaged_files_are_refused_or_sound(tmp_path_factory, data):
    """Whatever bits flip in the header, and wherever the file ends: no other error, and as strict as the library."""
    whole = bytearray(save({"a": np.arange(6, dtype=np.float32), "bb": np.ones((2, 3), np.float16)}))
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(1, len(whole))) :]
    path = tmp_path_factory.mktemp("flip") / "m.safetensors"
    path.write_bytes(whole)
    try:
        header = header_of(path)
    except ModelError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(whole) for tensor in header.values())
    try:
        with safe_open(path, "np") as library:
            assert set(library.keys()) == set(header)
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we took: {error}")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            b"version https://git-lfs.example/spec/v1\noid",
            "is a Git LFS pointer instead of the file; fetch it",
        ),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "is compressed with gzip; unpack it with gunzip"),
        (b"<!DOCTYPE html><html>", "is a web page; download the file itself"),
    ],
)
def test_files_that_are_something_else(head, words, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(head + bytes(100))
    with pytest.raises(ModelError, match=rf"m\.safetensors {words}"):
        MappedFile(path)


def test_a_header_whose_length_looks_like_another_format(tmp_path):
    """The first bytes of a safetensors file are a number, which may be any."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": tensor}).encode().ljust(0x088B1F)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with contextlib.closing(MappedFile(path)) as file:
        assert list(read_header(file)) == ["a"]
