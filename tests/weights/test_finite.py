"""Tensors with values that are NaN or infinite are found in every form of a model."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm.errors import ModelError
from mpillm.model.opening import open_source
from mpillm.tools.pack import PackedType, pack
from mpillm.weights.finite import check_vectors, first_not_finite
from mpillm.weights.names import USUAL
from mpillm.weights.roles import Key
from tests.model.engine_harness import _alone
from tests.model.golden import FIXTURES
from tests.tools.packing import Quiet, model_path

SOUND = ["llama_bias", "qwen3_moe", "smol_bf16", "llama_f16", "llama_kquants.gguf", "llama_mixed.gguf"]


@pytest.mark.parametrize("name", SOUND)
def test_sound_models(name: str, tmp_path: Path) -> None:
    pack(_alone(), str(model_path(name)), tmp_path / "packed", "source", Quiet())
    for path in (model_path(name), tmp_path / "packed"):
        with closing(open_source(path)) as source:
            check_vectors(source)
            assert first_not_finite(source) is None


@pytest.mark.parametrize("weights", ["source", "q8_0", "q4_0"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_finite_is_found(seed: int, weights: PackedType, tmp_path: Path) -> None:
    """In a matrix (of an expert, too), an embedding, or a vector, wherever it is."""
    draw = random.Random(f"{seed} {weights}")
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "models" / "qwen3_moe", folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    name = [draw.choice([n for n in names if "experts" in n]), draw.choice(names), "model.norm.weight"][seed]
    tensor = tensors[name]
    tensor[tuple(draw.randrange(size) for size in tensor.shape)] = draw.choice([np.nan, np.inf, -np.inf])
    save_file(tensors, folder / "model.safetensors")
    parsed = USUAL.parse_hf(name)
    assert parsed is not None
    keys = {Key(role, parsed.layer, parsed.expert) for role in parsed.roles}
    if tensor.ndim == 2:
        pack(_alone(), str(folder), tmp_path / "packed", weights, Quiet())
    for path in [folder, *([tmp_path / "packed"] if tensor.ndim == 2 else [])]:
        with closing(open_source(path)) as source:
            assert first_not_finite(source) in keys
            if tensor.ndim == 1:
                with pytest.raises(ModelError, match="has values that are not finite"):
                    check_vectors(source)
