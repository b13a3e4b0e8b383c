"""Quantised Hugging Face checkpoints, in the layouts that are published, against what their tensors stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mpillm.errors import ModelError
from mpillm.kernels import BlockType
from mpillm.model.opening import config_of, open_source
from mpillm.weights.formats.quantised import METHODS
from mpillm.weights.roles import ROLES, Key, hf_name
from tests.weights import quantised
from tests.weights.build import DTYPES, Tiny, write_hf

# How far a value may be off, by the largest of its row; scale x zero, which Q4_1 rounds, may be twice as large.
EXACT, FLOAT, HALF, INTEGER = 0.0, 2.0**-22, 2.0**-11, 2.0**-10
CT, GPTQ = {"quant_method": "compressed-tensors"}, {"quant_method": "gptq", "bits": 4, "group_size": 32}
W8A8 = {
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "int"},
            "input_activations": {"num_bits": 8, "type": "int"},
        }
    }
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
AWQ, ROUND = {"quant_method": "awq", "bits": 4, "version": "gemm"}, {"quant_method": "auto-round"}
MODELOPT, BNB = {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_method": "bitsandbytes"}
QUARK = {"quant_method": "quark", "export": {"pack_method": "reorder"}}
WIDE = Tiny(hidden=576, intermediate=704, n_heads=18, n_kv_heads=6, head_dim=32, n_layers=1)
Write = Callable[[np.random.Generator, int, int], quantised.Written]

# method: its configuration, what writes a matrix, the type it is delivered as, and how exactly
CASES: dict[str, tuple[dict[str, Any], Write, BlockType, float]] = {
    "fp8 blocks": (
        FP8 | {"weight_block_size": [128, 128]}, partial(quantised.fp8, block=(128, 128)), BlockType.FP8, EXACT,
    ),
    "fp8 wide blocks": (
        FP8 | {"weight_block_size": [32, 256]}, partial(quantised.fp8, block=(32, 256)), BlockType.FP8, EXACT,
    ),
    "fp8 small blocks": (
        FP8 | {"weight_block_size": [48, 40]}, partial(quantised.fp8, block=(48, 40)), BlockType.F16, HALF,
    ),
    "fp8 tensor": (FP8, partial(quantised.fp8, whole=True), BlockType.FP8, EXACT),
    "fp8 rows": (CT | {"format": "float-quantized"}, quantised.fp8, BlockType.FP8, EXACT),
    **{
        f"gptq {group}": (GPTQ | {"sym": True}, partial(quantised.gptq, group=group), BlockType.Q4_0, EXACT)
        for group in (32, 64, -1)
    },
    "gptq 16": (GPTQ | {"sym": True}, partial(quantised.gptq, group=16), BlockType.F16, HALF),
    "gptq act-order 64": (
        GPTQ | {"sym": False}, partial(quantised.gptq, group=64, sym=False, act=True), BlockType.F16, HALF,
    ),
    "gptq asymmetric": (GPTQ | {"sym": False}, partial(quantised.gptq, group=32, sym=False), BlockType.Q4_1, INTEGER),
    "gptq act-order": (
        GPTQ | {"sym": True, "desc_act": True}, partial(quantised.gptq, group=32, act=True), BlockType.F16, HALF,
    ),
    "gptq 8 bits": (
        GPTQ | {"bits": 8, "sym": True}, partial(quantised.gptq, group=64, bits=8), BlockType.Q8_0, EXACT,
    ),
    "gptq 8 bits asymmetric": (
        GPTQ | {"bits": 8, "sym": False}, partial(quantised.gptq, group=64, bits=8, sym=False), BlockType.F16, HALF,
    ),
    **{
        f"gptq {bits} bits": (
            GPTQ | {"bits": bits, "sym": True}, partial(quantised.gptq, group=64, bits=bits), BlockType.Q4_0, EXACT,
        )
        for bits in (2, 3)
    },
    "gptq 3 bits asymmetric": (
        GPTQ | {"bits": 3}, partial(quantised.gptq, group=32, bits=3, sym=False), BlockType.Q4_1, INTEGER,
    ),
    "gptq 3 bits act-order": (
        GPTQ | {"bits": 3}, partial(quantised.gptq, group=32, bits=3, act=True), BlockType.F16, HALF,
    ),
    "gptq of other bits": (  # than the configuration has for most layers
        GPTQ | {"bits": 4, "sym": True}, partial(quantised.gptq, group=64, bits=8), BlockType.Q8_0, EXACT,
    ),
    "gptq of other bits without g_idx": (
        GPTQ | {"bits": 2, "sym": False, "checkpoint_format": "gptq_v2"},
        partial(quantised.gptq, group=32, sym=False, plain=True), BlockType.Q4_1, INTEGER,
    ),
    "gptq with rules for layers": (  # as GPTQModel writes them
        GPTQ | {"sym": True, "format": "gptq_v2", "dynamic": {"-:lm_head": {}, r"+:.*_proj": {"sym": False}}},
        partial(quantised.gptq, group=32, sym=False, plain=True), BlockType.Q4_1, INTEGER,
    ),
    **{
        f"auto-round {bits} bits": (
            ROUND | {"bits": bits, "sym": False, "packing_format": "auto_round"},
            partial(quantised.gptq, group=32, bits=bits, sym=False, plain=True), BlockType.Q4_1, INTEGER,
        )
        for bits in (3, 4)
    },
    "auto-round as gptq": (
        ROUND | {"bits": 4, "sym": True, "packing_format": "auto_round:auto_gptq"},
        partial(quantised.gptq, group=32), BlockType.Q4_0, EXACT,
    ),
    "auto-round as awq": (
        ROUND | {"bits": 4, "sym": True, "packing_format": "auto_round:auto_awq"},
        partial(quantised.awq, group=32, sym=True), BlockType.Q4_0, EXACT,
    ),
    "awq symmetric": (
        AWQ | {"zero_point": False}, partial(quantised.awq, group=32, sym=True), BlockType.Q4_0, EXACT,
    ),
    "awq": (AWQ, partial(quantised.awq, group=64), BlockType.Q4_1, INTEGER),
    "awq 32": (AWQ, partial(quantised.awq, group=32), BlockType.Q4_1, INTEGER),
    "awq 16": (AWQ, partial(quantised.awq, group=16), BlockType.F16, HALF),
    "int4": (CT, partial(quantised.packed, group=32), BlockType.Q4_0, EXACT),
    "int4 16": (CT, partial(quantised.packed, group=16), BlockType.F16, HALF),
    "int4 asymmetric 32": (CT, partial(quantised.packed, group=32, zero=True), BlockType.Q4_1, INTEGER),
    "int4 rows": (
        CT | {"config_groups": {"odd": {"weights": {"num_bits": [4]}}}},
        partial(quantised.packed, group=-1), BlockType.Q4_0, EXACT,
    ),
    "int4 asymmetric": (CT, partial(quantised.packed, group=64, zero=True), BlockType.Q4_1, INTEGER),
    "int4 with zeros in bytes": (
        CT, partial(quantised.packed, group=32, zero=True, apart=True), BlockType.Q4_1, INTEGER,
    ),
    "int4 act-order": (CT, partial(quantised.packed, group=32, act=True), BlockType.F16, HALF),
    "int8 in words": (CT, partial(quantised.packed, group=64, bits=8), BlockType.Q8_0, EXACT),
    **{
        f"int{bits}": (CT, partial(quantised.packed, group=64, bits=bits), type, EXACT)
        for bits, type in ((2, BlockType.Q4_0), (3, BlockType.Q4_0), (5, BlockType.Q5_0), (6, BlockType.Q8_0))
    },
    **{
        f"int{bits} asymmetric": (CT, partial(quantised.packed, group=32, bits=bits, zero=True), type, bound)
        for bits, type, bound in (
            (3, BlockType.Q4_1, INTEGER), (5, BlockType.Q5_1, INTEGER), (7, BlockType.Q8_0, EXACT),
            (8, BlockType.F16, HALF),
        )
    },
    "int4 tensor": (CT, quantised.packed_whole, BlockType.Q4_1, INTEGER),
    "int8": (CT, quantised.int8, BlockType.Q8_0, HALF),
    "w8a8": (CT | W8A8, quantised.int8, BlockType.W8A8, EXACT),
    "w8a8 groups": (CT | W8A8, partial(quantised.int8, group=32), BlockType.Q8_0, HALF),
    "w8a8 asymmetric": (CT | W8A8, partial(quantised.int8, zero=True), BlockType.F16, HALF),
    "int8 groups": (CT, partial(quantised.int8, group=32), BlockType.Q8_0, HALF),
    "int8 small groups": (CT, partial(quantised.int8, group=8), BlockType.F16, HALF),
    "int8 asymmetric": (CT, partial(quantised.int8, zero=True), BlockType.F16, HALF),
    "mxfp6": (CT, quantised.mxfp6, BlockType.Q8_0, EXACT),
    "mxfp8": (CT, quantised.mxfp8, BlockType.F16, EXACT),
    "mxfp8 of its own": (
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        partial(quantised.mxfp8, inverse=True), BlockType.F16, EXACT,
    ),
    "nvfp4": (CT, quantised.nvfp4, BlockType.NVFP4, FLOAT),
    "nvfp4 modelopt": (MODELOPT, partial(quantised.nvfp4, optimum=True), BlockType.NVFP4, FLOAT),
    **{
        f"modelopt {algorithm}": (MODELOPT | {"quant_algo": algorithm}, write, type, EXACT)
        for algorithm, write, type in (
            ("FP8_PER_CHANNEL_PER_TOKEN", quantised.fp8, BlockType.FP8),
            ("fp8_pb_wo", partial(quantised.fp8, block=(128, 128), four=True), BlockType.FP8),
            ("MXFP8", quantised.mxfp8, BlockType.F16),
        )
    },
    "nvfp4 modelopt weights alone": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_NVFP4"}},
        partial(quantised.nvfp4, optimum=True), BlockType.NVFP4, FLOAT,
    ),
    "fp8 fbgemm": ({"quant_method": "fbgemm_fp8"}, quantised.fp8, BlockType.FP8, EXACT),
    "mxfp4": (CT, quantised.mxfp4, BlockType.MXFP4, EXACT),
    "nf4": (BNB | {"load_in_4bit": True}, partial(quantised.nf4, nested=False), BlockType.NF4, EXACT),
    "nf4 nested": (BNB | {"load_in_4bit": True}, partial(quantised.nf4, nested=True), BlockType.NF4, EXACT),
    "nf4 stored as bf16": (
        BNB | {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        partial(quantised.nf4, nested=True, storage=ml_dtypes.bfloat16), BlockType.NF4, EXACT,
    ),
    "nf4 large blocks": (
        BNB | {"load_in_4bit": True}, partial(quantised.nf4, nested=True, block=256), BlockType.NF4, EXACT,
    ),
    "nf4 small blocks": (
        BNB | {"load_in_4bit": True}, partial(quantised.nf4, nested=False, block=32), BlockType.F16, HALF,
    ),
    "fp4": (
        BNB | {"load_in_4bit": True}, partial(quantised.nf4, nested=False, table=quantised.FP4), BlockType.F16, HALF,
    ),
    **{
        f"quark {case}": (QUARK | {"global_quant_config": {"weight": weight}}, write, type, bound)
        for case, weight, write, type, bound in (
            ("fp8", {"dtype": "fp8_e4m3", "qscheme": "per_channel"}, quantised.fp8, BlockType.FP8, EXACT),
            ("int8", {"dtype": "int8", "qscheme": "per_channel"}, quantised.int8, BlockType.Q8_0, HALF),
            (
                "mxfp4", {"dtype": "fp4", "group_size": 32},
                partial(quantised.mxfp4, name="weight"), BlockType.MXFP4, EXACT,
            ),
            (
                "nvfp4", [{"dtype": "fp4", "group_size": 16}, {"dtype": "fp8_e4m3"}],
                partial(quantised.nvfp4, optimum=True), BlockType.NVFP4, FLOAT,
            ),
            (
                "int4", {"dtype": "int4", "symmetric": True}, partial(quantised.quark, group=32), BlockType.Q4_0, EXACT,
            ),
            (
                "uint4", {"dtype": "uint4", "symmetric": False},
                partial(quantised.quark, group=64, signed=False), BlockType.Q4_1, INTEGER,
            ),
        )
    },
    "quark in order": (
        QUARK | {"global_quant_config": {"weight": {"dtype": "int4"}}, "export": {"pack_method": "order"}},
        partial(quantised.quark, group=32, zero=True, order=list(range(8))), BlockType.Q4_1, INTEGER,
    ),
    "llm.int8": (BNB | {"load_in_8bit": True}, quantised.llm_int8, BlockType.Q8_0, HALF),
}  # fmt: skip


def checkpoint(path: Path, case: str, model: Tiny, others: str = "BF16") -> dict[str, np.ndarray]:
    """Write a model with quantised matrices of layers, whose values are returned, and all else as `others`."""
    config, write, _, _ = CASES[case]
    random = np.random.default_rng(len(case))
    tensors, values = {}, {}
    for name, value in model.weights().items():
        if value.ndim < 2 or "layers" not in name:
            tensors[name] = value.astype(DTYPES[others])
            continue
        made, w = write(random, *value.shape)
        base = name.removesuffix("weight")
        tensors |= {base + end: tensor for end, tensor in made.items()}
        values[name] = w
    write_hf(path, tensors, model.config() | {"quantization_config": config})
    return values


def keys(model: Tiny) -> list[Key]:
    names = [role.name for role in ROLES.values() if role.name in {"q", "k", "v", "o", "gate", "up", "down"}]
    return [Key(name, layer) for name in names for layer in range(model.n_layers)]


@pytest.mark.parametrize("case", CASES)
def test_values(tmp_path: Path, case: str) -> None:
    """As they are delivered, whole and piece by piece; 192, 320, 576 and 704 columns leave ragged blocks of 128."""
    _, _, type, bound = CASES[case]
    narrow = Tiny(hidden=192, intermediate=320, n_heads=6, n_kv_heads=2, head_dim=32, n_layers=1)
    model = WIDE if type.scaled else narrow
    made, roles = checkpoint(tmp_path / "m", case, model), {hf_name(key): key for key in keys(model)}
    values = {roles[name]: w for name, w in made.items()}
    with closing(open_source(tmp_path / "m")) as source:
        config_of(source)  # is complete
        assert len(values) == 7
        for key, w in values.items():
            assert source.tensors[key].type == type
            got = source.read_f32(key)
            assert np.isfinite(got).all()
            assert (np.abs(got - w).max(axis=1) <= bound * np.abs(w).max(axis=1)).all(), key
            raw = source.read(key)
            for first in range(0, len(w), 48):
                rows = range(first, min(first + 48, len(w)))
                assert (source.read(key, rows) == raw[rows.start : rows.stop]).all()
                assert (source.read_f32(key, np.array(rows)[::-1]) == got[rows.start : rows.stop][::-1]).all()
        assert source.tensors[Key("head")].type == BlockType.BF16


@pytest.mark.parametrize("case", ["fp8 blocks", "nvfp4", "nf4"])
def test_what_is_too_narrow_to_be_cut_in_blocks(tmp_path: Path, case: str) -> None:
    """Shards hold columns of o and down: of few columns these become F32, and are exact as well."""
    model = Tiny(hidden=192, intermediate=320, n_heads=6, n_kv_heads=2, head_dim=32, n_layers=1)
    _, _, type, bound = CASES[case]
    made, roles = checkpoint(tmp_path / "m", case, model), {hf_name(key): key for key in keys(model)}
    with closing(open_source(tmp_path / "m")) as source:
        assert config_of(source).max_shards > 1
        for name, w in made.items():
            key = roles[name]
            narrow = key.role in ("o", "down")
            assert source.tensors[key].type == (BlockType.F32 if narrow else type)
            if narrow:
                got = source.read(key).view(np.float32)
                assert (np.abs(got - w).max(axis=1) <= bound * np.abs(w).max(axis=1)).all(), key


def test_bits_of_few_columns(tmp_path: Path) -> None:
    """16 numbers of 7 or of 8 bits are in 4 words: the configuration tells, which names 8 bits of FP8 alone."""
    parts, w = quantised.packed(np.random.default_rng(1), 64, 16, group=-1, bits=7)
    model = Tiny(hidden=16, n_heads=2, n_kv_heads=2, head_dim=32, n_layers=1)
    name = "model.layers.0.self_attn.q_proj."
    tensors = {key: value for key, value in model.weights().items() if key != f"{name}weight"}
    said = [{"num_bits": 8, "type": "float"}, {"num_bits": 7, "type": "int"}]
    groups = {str(number): {"weights": weights} for number, weights in enumerate(said)}
    config = {**model.config(), "quantization_config": CT | {"config_groups": groups}}
    write_hf(tmp_path / "m", tensors | {name + end: part for end, part in parts.items()}, config)
    with closing(open_source(tmp_path / "m")) as source:
        got = source.read_f32(Key("q", 0))
        assert (np.abs(got - w).max(axis=1) <= HALF * np.abs(w).max(axis=1)).all()


def test_a_configuration_of_modelopt_in_a_file_of_its_own(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", "nvfp4 modelopt", WIDE)
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "m/hf_quant_config.json").write_text(json.dumps(said))
    with closing(open_source(tmp_path / "m")) as source:
        assert source.tensors[Key("gate", 0)].type is BlockType.NVFP4


def test_the_older_name_of_the_configuration_of_compressed_tensors(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", "int8", WIDE)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with closing(open_source(tmp_path / "m")) as source:
        assert source.tensors[Key("gate", 0)].type is BlockType.Q8_0


def test_numbers_that_are_none_stay_so(tmp_path: Path) -> None:
    """A code of NaN makes its block NaN: it is no number of the kernels."""
    model = Tiny(hidden=128, intermediate=512, n_heads=16, n_kv_heads=4, head_dim=32, n_layers=1)
    random = np.random.default_rng(5)
    values = (random.standard_normal((512, 128)) * 60).astype(ml_dtypes.float8_e4m3fn)
    values[3, 17] = np.nan
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = model.weights() | {name: values, f"{name}_scale": np.array(np.float32(0.01))}
    write_hf(tmp_path / "m", tensors, model.config() | {"quantization_config": FP8})
    with closing(open_source(tmp_path / "m")) as source:
        got = source.read_f32(Key("up", 0))
        assert np.isnan(got[3]).all()
        assert np.isfinite(np.delete(got, 3, axis=0)).all()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen35_images", "phi3", "gpt_oss", "roberta_masked"])
def test_what_holds_several_matrices_and_what_is_not_read(name: str, tmp_path: Path) -> None:
    """Rows of q and its gate, and of qkvz, alternate by heads; what predicts other tokens is quantised too."""
    folder = next((Path(__file__).parents[1] / "fixtures").glob(f"[mp]o*/{name}"))
    plain, made, random = load_file(folder / "model.safetensors"), {}, np.random.default_rng(4)
    for tensor, value in plain.items():
        made[tensor] = value
        if value.ndim == 2 and re.search(r"(proj\w*|fc|dense)\.weight", tensor):
            parts, plain[tensor] = quantised.fp8(random, *value.shape)
            made |= {tensor.removesuffix("weight") + end: part for end, part in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    write_hf(tmp_path / "plain", plain, config)
    write_hf(tmp_path / "made", made, config | {"quantization_config": FP8})
    with closing(open_source(tmp_path / "plain")) as one, closing(open_source(tmp_path / "made")) as other:
        assert config_of(one) == config_of(other)
        assert any(other.tensors[key].type is BlockType.FP8 for key in one.tensors)
        for key in one.tensors:
            assert (one.read_f32(key) == other.read_f32(key)).all(), key


def test_experts_of_llama4_that_lie_apart(tmp_path: Path) -> None:
    """As quantised files of it have them; published ones have all of a layer in one tensor, transposed."""
    folder = Path(__file__).parents[1] / "fixtures/models/llama4"
    made: dict[str, np.ndarray] = {}
    for tensor, value in load_file(folder / "model.safetensors").items():
        base, _, found = tensor.rpartition(".experts.")
        if not base:
            made[tensor] = value
            continue
        for expert, matrix in enumerate(value):
            parts = np.split(matrix.T, 2) if found == "gate_up_proj" else [matrix.T]
            for name, part in zip(("gate", "up") if len(parts) > 1 else ("down",), parts, strict=True):
                made[f"{base}.experts.{expert}.{name}_proj.weight"] = part
    write_hf(tmp_path / "m", made, json.loads((folder / "config.json").read_text()))
    with closing(open_source(folder)) as one, closing(open_source(tmp_path / "m")) as other:
        assert one.tensors.keys() == other.tensors.keys()
        for key in one.tensors:
            assert (one.read_f32(key) == other.read_f32(key)).all(), key


def test_experts_of_llama4_that_modelopt_leaves_transposed(tmp_path: Path) -> None:
    """gate and up in NVFP4, down, whose columns are no whole blocks of it, in FP8 with one scale for all experts."""
    folder, random = Path(__file__).parents[1] / "fixtures/models/llama4", np.random.default_rng(3)
    plain = load_file(folder / "model.safetensors")
    made = dict(plain)
    for tensor in [name for name in plain if ".experts." in name]:
        experts, k, n = plain[tensor].shape
        del made[tensor]
        if k % 16:
            values = (random.standard_normal((experts, k, n)) * 60).astype(ml_dtypes.float8_e4m3fn)
            made |= {tensor: values, f"{tensor}_weight_scale": np.array(np.float32(0.01))}
            plain[tensor] = values.astype(np.float32) * np.float32(0.01)
            continue
        parts = [quantised.nvfp4(random, n, k, optimum=True) for _ in range(experts)]
        for end in ("", "_scale", "_scale_2"):
            stacked = np.stack([one[f"weight{end}"] for one, _ in parts])
            made[f"{tensor}_weight{end}" if end else tensor] = (
                stacked.swapaxes(1, -1) if stacked.ndim > 1 else stacked
            )
        made[f"{tensor}_input_scale"] = np.array(np.float32(1))
        plain[tensor] = np.stack([w for _, w in parts]).swapaxes(1, 2)
    config = json.loads((folder / "config.json").read_text())
    write_hf(tmp_path / "plain", plain, config)
    write_hf(tmp_path / "made", made, config | {"quantization_config": MODELOPT})
    with closing(open_source(tmp_path / "plain")) as one, closing(open_source(tmp_path / "made")) as other:
        assert config_of(one) == config_of(other)
        for key in one.tensors:
            whole = one.read_f32(key)
            assert (np.abs(other.read_f32(key) - whole) <= FLOAT * np.abs(whole).max()).all(), key
            if key.expert >= 0:
                assert (other.read_f32(key, range(3, 9)) == other.read_f32(key)[3:9]).all(), key
                assert (other.read(key, range(5)) == other.read(key)[:5]).all(), key


def test_every_method_has_a_case() -> None:
    assert {config["quant_method"] for config, *_ in CASES.values()} | {"mxfp4"} == set(METHODS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "hqq"},
            "has quant_method 'hqq', which is not supported; supported are auto-round, awq, bitsandbytes",
        ),
        ({"bits": 4}, "names no quant_method; supported are auto-round, awq, "),
        ({"quant_method": "gptq", "bits": "4"}, "gptq with '4' bits is not supported; supported: 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 5}, "gptq with 5 bits is not supported; supported: 2, 3, 4, 8"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"},
            "gptq in the format 'gptq_p' is not supported; supported: gptq, gptq_v2.",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq version 'gemv' is not supported"),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:fake"},
            "packing_format 'auto_round:fake' is not supported; supported: auto_round, ",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": ["auto_round"]},
            """packing_format "['auto_round']" is not supported; supported: auto_round, """,
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8"},
            "quant_algo 'W4A8' is not supported; supported: NVFP4, W4A16_NVFP4, FP8, ",
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]},
            },
            "int4 numbers of FP8 ones are not supported",
        ),
        (
            {"quant_method": "quark", "algo_config": [{"name": "rotation", "online_r1_rotation": True}]},
            "activations that are rotated (algo_config) are not supported",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 numbers in e5m2 are not supported"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
            "transform_config of compressed",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    """An unknown method before a tensor is read: there is none."""
    write_hf(tmp_path, Tiny().weights(), Tiny().config() | {"quantization_config": config})
    if config.get("quant_method") in ("hqq", None):
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=re.escape(message)):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("case", "drop", "message"),
    [
        ("gptq 32", ".scales", "has no tensor .*scales; the model is not complete"),
        (
            "gptq act-order",
            ".g_idx",
            "has no tensor .*g_idx, but its desc_act says .*; the model is not complete",
        ),
        ("fp8 blocks", "_scale_inv", "has no tensor .*weight_scale; the model is not complete"),
        ("int4", "_scale", "has no tensor .*weight_scale; the model is not complete"),
        ("nf4", ".absmax", "has no tensor .*absmax; the model is not complete"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, case: str, drop: str, message: str) -> None:
    config, write, _, _ = CASES[case]
    made, _ = write(np.random.default_rng(1), 64, 64)
    tensors = {
        f"model.layers.0.self_attn.q_proj.{end}": value
        for end, value in made.items()
        if drop not in f".{end}"
    }
    write_hf(tmp_path, tensors, Tiny().config() | {"quantization_config": config})
    with pytest.raises(ModelError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("case", "tensor", "change", "message"),
    [
        ("gptq 32", "qweight", np.ravel, r"qweight is I32 \[512\], but must be a matrix of I32"),
        ("awq", "qweight", np.ravel, r"qweight is I32 \[512\], but must be a matrix of I32"),
        ("awq", "scales", np.ravel, r"scales is F16 \[64\], but must be .* \[64, 64\]"),
        ("int4 act-order", "weight_g_idx", np.float32, r"weight_g_idx is F32 \[64\], but must be I32 or I64"),
    ],
)
def test_shapes_and_types_that_no_method_has(
    tmp_path: Path, case: str, tensor: str, change: Callable[[Any], Any], message: str
) -> None:
    config, write, _, _ = CASES[case]
    made, _ = write(np.random.default_rng(1), 64, 64)
    made[tensor] = np.asarray(change(made[tensor]))
    tensors = {f"model.layers.0.self_attn.q_proj.{end}": value for end, value in made.items()}
    write_hf(tmp_path, tensors, Tiny().config() | {"quantization_config": config})
    with pytest.raises(ModelError, match=message):
        open_source(tmp_path)


def test_a_bias_of_zeros_that_the_configuration_lacks(tmp_path: Path) -> None:
    model = Tiny(hidden=64, n_layers=1)
    name = "model.layers.0.self_attn.q_proj.bias"
    for value, fits in ((np.zeros(64, np.float32), True), (np.ones(64, np.float32), False)):
        path = write_hf(tmp_path / str(fits), model.weights() | {name: value}, model.config())
        with closing(open_source(path)) as source:
            if fits:
                config_of(source)
                continue
            with pytest.raises(ModelError, match="has q_bias of layer 0"):
                config_of(source)
