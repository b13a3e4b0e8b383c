"""Forms in which llama.cpp's converter, or other programs, write the same model: they change no bit of an answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from mpillm.errors import ModelError
from mpillm.model.opening import config_of, open_source
from tests.model.checks import digest, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import gguf_path, golden

Tensors = dict[str, tuple[np.ndarray, Any]]
Fields = dict[str, tuple[Any, GGUFValueType]]


def rewritten(
    name: str, path: Path, change: Callable[[Fields, Tensors], None] = lambda fields, tensors: None
) -> Path:
    """A copy of a fixture in which `change` has changed fields (without the architecture's name) and tensors."""
    reader = GGUFReader(gguf_path(name))
    kind = reader.fields["general.architecture"].contents()
    prefix = f"{kind}."
    fields: Fields = {
        field.name.removeprefix(prefix): (field.contents(), field.types[0])
        for field in reader.fields.values()
        if field.name.startswith(prefix)
    }
    tensors: Tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    change(fields, tensors)
    writer = GGUFWriter(path, kind)
    for key, (value, of) in fields.items():
        if of == GGUFValueType.ARRAY:
            writer.add_array(prefix + key, value)
        else:
            writer.add_key_value(prefix + key, value, of)
    for key, (data, of) in tensors.items():
        writer.add_tensor(key, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fused(fields: Fields, tensors: Tensors) -> None:
    """q, k and v of each layer in one tensor (the converter's --fuse-qkv)."""
    for name in [name for name in tensors if ".attn_q." in name]:
        names = [name.replace("attn_q", f"attn_{part}") for part in "qkv"]
        parts = [tensors.pop(one) for one in names]
        assert len({of for _, of in parts}) == 1
        tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate([data for data, _ in parts]), parts[0][1]


def unnamed_norm(fields: Fields, tensors: Tensors) -> None:
    """The converter writes the second norm of Falcon-H1 without the end of its name."""
    for name in [name for name in tensors if name.endswith(".ffn_norm.weight")]:
        tensors[name.removesuffix(".weight")] = tensors.pop(name)


def both_eps(fields: Fields, tensors: Tensors) -> None:
    """The converter takes a configuration's norm_eps for that of RMS norms too."""
    fields["attention.layer_norm_rms_epsilon"] = 0.25, GGUFValueType.FLOAT32


def second_norm(fields: Fields, tensors: Tensors) -> None:
    """Falcon's newer layers have two norms, with one head of keys too."""
    for name in [name for name in tensors if ".attn_norm." in name]:
        tensors[name.replace("attn_norm", "attn_norm_2")] = tensors[name]


def base_of_windows(fields: Fields, tensors: Tensors) -> None:
    fields["rope.freq_base_swa"] = fields["rope.freq_base"]


def zero_biases(fields: Fields, tensors: Tensors) -> None:
    for name in [name for name in tensors if ".attn_" in name and "norm" not in name]:
        rows = tensors[name][0].shape[0]
        tensors[name.replace("weight", "bias")] = np.zeros(rows, np.float32), None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_f16_factors", fused),  # rows of q and k in llama.cpp's order
        ("glm4_f16", fused),
        ("jais2_f16", fused),  # with biases
        ("falcon_f16", second_norm),
        ("gemma2_f16", fused),
        ("stablelm_f16", fused),
        ("hunyuan_f16", fused),
        ("minimax_m2_f16", fused),
        ("falcon_h1_f16", unnamed_norm),
        ("nemotron_f16", both_eps),
        ("olmo3_f16", base_of_windows),
        ("granite_f16", zero_biases),
    ],
)
def test_the_same_answers(tmp_path: Path, name: str, change: Callable[[Fields, Tensors], None]) -> None:
    requests = requests_of(golden(f"{name}.gguf"))
    other = rewritten(name, tmp_path / "other.gguf", change)
    assert digest(run_engine(other, requests)) == digest(run_engine(gguf_path(name), requests))


def test_windows_may_have_another_base(tmp_path: Path) -> None:
    def local(fields: Fields, tensors: Tensors) -> None:
        fields["rope.freq_base_swa"] = 1000.0, GGUFValueType.FLOAT32

    with closing(open_source(rewritten("olmo3_f16", tmp_path / "m.gguf", local))) as source:
        rotaries = [layer.mixer.rotary.config for layer in config_of(source).layers]
    assert [rotary.theta for rotary in rotaries] == [1000.0, 1000.0, 1000.0, 5e5]


def test_layers_of_other_heads_are_not_taken_apart_wrongly(tmp_path: Path) -> None:
    """Gemma 4 has longer heads in some layers."""

    def longer(fields: Fields, tensors: Tensors) -> None:
        fused(fields, tensors)
        data, of = tensors["blk.1.attn_qkv.weight"]
        tensors["blk.1.attn_qkv.weight"] = np.concatenate([data, data]), of

    path = rewritten("gemma2_f16", tmp_path / "fused.gguf", longer)
    with pytest.raises(ModelError, match=r"attn_qkv.weight has 192 rows, but its 3 parts have 96"):
        open_source(path)


def test_granite_rotates_unless_the_file_denies_it(tmp_path: Path) -> None:
    def silent(fields: Fields, tensors: Tensors) -> None:
        assert fields.pop("rope.scaling.finetuned")[0] is False

    for change, said in ((None, "nope"), (silent, "rope")):
        path = rewritten("granitehybrid_f16", tmp_path / "m.gguf", *filter(None, [change]))
        with closing(open_source(path)) as source:
            assert source.config["position_embedding_type"] == said


def test_longrope_begins_where_the_file_says(tmp_path: Path) -> None:
    def shorter(fields: Fields, tensors: Tensors) -> None:
        half = fields["rope.dimension_count"][0] // 2
        for kind in ("short", "long"):
            tensors[f"rope_factors_{kind}.weight"] = np.linspace(1, 2, half, dtype=np.float32), None
        fields["rope.scaling.original_context_length"] = 40, GGUFValueType.UINT32

    with closing(open_source(rewritten("phi3_f16", tmp_path / "m.gguf", shorter))) as source:
        assert config_of(source).short_length == 40
