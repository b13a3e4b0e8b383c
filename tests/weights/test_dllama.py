"""Distributed-Llama's model files: their headers, sizes, and what lies beside them."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.comm.program import start
from mpillm.errors import JobError, ModelError
from mpillm.model.opening import config_of, open_source
from mpillm.tools.pack import pack
from mpillm.weights.identity import fingerprint, identity
from tests.tools.packing import Quiet
from tests.weights.build import Tiny, write_hf
from tests.weights.dllama_files import convert, header_bytes, header_of, write_model, write_tokenizer

TINY = Tiny(n_layers=2, vocab=70, seed=3)
CONFIG = TINY.config() | {"max_position_embeddings": 128}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dllama_model_tiny_q80.m", CONFIG, TINY.weights(), "q80")


def with_header(path: Path, change: Callable[[dict[Any, int]], None], magic: int = 0xA00ABCD) -> Path:
    """The file with another header."""
    values: dict[Any, int] = dict(header_of(CONFIG, "q80"))
    data = path.read_bytes()[len(header_bytes(values)) :]
    change(values)
    path.write_bytes(header_bytes(values, magic) + data)
    return path


WRONG: dict[str, tuple[dict[Any, int | None], str]] = {
    "a new key": ({22: 1}, "has the header key 22, which is unknown and may change the result"),
    "a key below all": ({-7: 1}, "has the header key -7"),
    "no layers": ({"n_layers": None}, "its header has no n_layers"),
    "no type": ({"weights_float_type": None}, "its header has no weights_float_type"),
    "an unknown type": ({"weights_float_type": 4}, "weights_float_type is 4 in its header, but must be one of"),
    "an unknown architecture": ({"arch_type": 0xABCD03}, "arch_type is 11259139 in its header, but must be one of"),
    "GELU": ({"hidden_act": 0}, "hidden_act is 0 in its header, but must be one of 1"),
    "a newer version": ({"version": 1}, "version is 1 in its header, but must be one of 0"),
    "another epsilon": ({"norm_epsilon": 7}, "norm_epsilon is 7 in its header, but must be one of 5, 6"),
    "another RoPE": ({"rope_type": 3}, "rope_type is 3 in its header, but must be one of 0, 1, 2"),
    "no width": ({"dim": 0}, "dim is 0 in its header, but must be at least 1"),
    "a negative width": ({"hidden_dim": -96}, "hidden_dim is -96 in its header, but must be at least 1"),
    "experts of Llama": ({"n_experts": 4}, "that does not go with 4 experts"),
    "as many experts as fit": ({"n_experts": 2**31 - 1}, "n_experts is 2147483647 in its header, but must be at most"),
    "layers without end": ({"n_layers": 4000}, "bytes, but its header describes"),
    "another vocabulary": ({"vocab_size": 71}, "bytes, but its header describes"),
    "no whole blocks": ({"hidden_dim": 97}, "has rows of 97 values, not whole blocks of 32"),
    "odd heads": ({"head_dim": 15}, "a head has 15 dimensions, but rope needs an even number"),
    "more heads of keys than of queries": ({"n_heads": 2, "n_kv_heads": 4}, "num_key_value_heads"),
    "scaling without its numbers": ({"rope_scaling_factor": 8}, "its header has no rope_scaling_low_freq_factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_headers_that_are_wrong(model: Path, name: str) -> None:
    changes, words = WRONG[name]

    def change(values: dict[Any, int]) -> None:
        for key, value in changes.items():
            if value is None:
                del values[key]
            else:
                values[key] = value

    with pytest.raises(ModelError, match=words) as caught:
        open_source(with_header(model, change))
    assert str(model) in str(caught.value)


def test_files_that_are_something_else(model: Path, tmp_path: Path) -> None:
    for magic in (0xABCD00, 0xABCD01):
        with pytest.raises(ModelError, match="old format, without keys; convert the model again"):
            open_source(with_header(model, lambda values: None, magic))
    for data in (b"GGUF" + bytes(40), b"\0", bytes(7)):
        (tmp_path / "other.m").write_bytes(data)
        with pytest.raises(ModelError, match=r"other\.m is not a model file of Distributed-Llama"):
            open_source(tmp_path / "other.m")


def test_every_cut_and_any_damage_to_the_header_is_found(model: Path) -> None:
    """Or is harmless; nothing else than a ModelError is raised."""
    data = model.read_bytes()
    header = struct.unpack_from("<i", data, 4)[0]
    for stop in (*range(1, header + 9), len(data) // 2, len(data) - 1):
        model.write_bytes(data[:stop])
        with pytest.raises(ModelError):
            open_source(model)
    random = np.random.default_rng(5)
    for _ in range(150):
        damaged = bytearray(data)
        at = int(random.integers(4, header))
        damaged[at] ^= int(random.integers(1, 256))
        model.write_bytes(damaged)
        try:
            with closing(open_source(model)) as source:
                config_of(source)
        except ModelError:
            continue


def test_the_name_does_not_matter_where_the_file_begins_as_such(model: Path, tmp_path: Path) -> None:
    with closing(open_source(model.rename(tmp_path / "model.bin"))) as source:
        assert config_of(source).n_layers == 2


def test_a_directory_with_one_model(model: Path) -> None:
    with closing(open_source(model.parent)) as source:
        assert source.path == model
    shutil.copy(model, model.parent / "other.m")
    with pytest.raises(ModelError, match=r"holds 2 models \(\.m\); give the path of one"):
        open_source(model.parent)


def test_the_tokenizer_beside(model: Path) -> None:
    """The only one, whatever its name; of several the one with the model's name."""
    folder = model.parent
    tokens = [bytes([byte]) for byte in range(256)] + [b"<s>"]
    with closing(open_source(model)) as source:
        assert source.tokenizer == {}
    alone = write_tokenizer(folder / "strange.t", tokens, 256, [256])
    with closing(open_source(model)) as source:
        assert source.tokenizer == alone
        one = fingerprint(source)
        assert set(identity(source)) == {model.name, alone.name}
    write_tokenizer(folder / "another.t", tokens, 256, [255])
    with pytest.raises(ModelError, match=r"holds 2 tokenizers .* dllama_tokenizer_tiny_q80\.t"):
        open_source(model)
    named = write_tokenizer(folder / "dllama_tokenizer_tiny_q80.t", tokens, 256, [254])
    with closing(open_source(model)) as source:
        assert source.tokenizer == named
        assert fingerprint(source) != one


def test_quantise_and_pack(tmp_path: Path) -> None:
    """A packed model has the tokenizer with it; what is quantised already is not quantised again."""
    hf = write_hf(tmp_path / "hf", TINY.weights(), CONFIG)
    model = convert(hf, tmp_path / "tiny.m", "f32")
    write_tokenizer(tmp_path / "tiny.t", [bytes([byte]) for byte in range(256)] + [b"<s>"], 256, [256])
    pack(start(), str(model), tmp_path / "packed", "source", Quiet())
    with closing(open_source(tmp_path / "packed")) as packed, closing(open_source(hf)) as source:
        assert packed.tokenizer == tmp_path / "packed/tokenizer.t"
        assert packed.tensors.keys() == source.tensors.keys()
        assert config_of(packed).layers == config_of(source).layers
    convert(hf, model, "q40")
    with pytest.raises(JobError, match="is quantised already"):
        open_source(model, "q8_0")
