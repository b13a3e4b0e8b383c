"""Synthetic models of published ones have their parameters and their layers, and can be planned."""

from __future__ import annotations

import math
import re
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillm import spec
from mpillm.bench import packed, synthetic, synthetic_shapes
from mpillm.bench.published import PUBLISHED
from mpillm.errors import JobError
from mpillm.model.config import ModelConfig
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.planning import plan
from mpillm.weights.roles import Key
from mpillm.weights.source import check_tensors

PARAMETERS = {  # of the text model alone, without layers that predict further tokens
    "gpt-oss-20b": 20.9e9,
    "gpt-oss-120b": 116.8e9,
    "deepseek-v3": 671e9,
    "glm-4.5-air": 106.8e9,
    "qwen3.6-35b-a3b": 34.7e9,
    "gemma-3-27b": 27.0e9,
}


def shapes(config: ModelConfig, layer: int) -> list[tuple[Key, tuple[int, ...]]]:
    """What tensors a layer has."""
    pages = list(config.pages(layer))
    if experts := config.experts(layer):
        pages.append(experts[0])
    return [(tensor.key, tensor.shape) for page in pages for tensor in page.tensors]


def rotary(layer: LayerSpec) -> list[float]:
    """How a layer turns its heads, and how it scales scores."""
    scale, found = getattr(layer.mixer, "scale", 0.0), getattr(layer.mixer, "rotary", None)
    if found is None:
        return [scale]
    rope = found.config
    return [
        scale,
        found.dim,
        found.interleaved,
        rope.theta,
        rope.factor,
        rope.attention_factor,
        rope.score_factor,
    ]


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models are written with their header alone, for no disk here holds the largest."""
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(synthetic, "require_room", lambda path, needed: None)
    monkeypatch.setattr(synthetic, "random_blocks", lambda kind, k: np.zeros((1, 1), np.uint8))

    def hole(write: object, pool: bytes, block_bytes: int, seed: int, length: int) -> None:
        file = write.__self__  # type: ignore[attr-defined]
        file.seek(length, 1)
        file.truncate(file.tell())

    monkeypatch.setattr(synthetic, "_repeat", hole)
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_is_what_its_configuration_says(sparse: Path, name: str) -> None:
    published = PUBLISHED[name]
    wanted = published.model()
    count = sum(math.prod(shape) for _, shape, _ in published.tensors())
    assert count == pytest.approx(PARAMETERS[name], rel=0.01)
    arch = next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == published.architecture)
    names = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    stems = (tensor.removesuffix(".weight").removesuffix(".bias") for tensor, *_ in published.tensors())
    assert {re.sub(r"^blk\.\d+", "blk.{bid}", stem) for stem in stems} <= names  # llama.cpp's
    path = synthetic.create(name, "q4_k_m" if "oss" not in name else "mxfp4")
    with closing(open_source(path)) as source:
        found = config_of(source)
        check_tensors(source, found)
        assert (found.hidden, found.vocab, found.n_layers) == (wanted.hidden, wanted.vocab, wanted.n_layers)
        assert (found.max_position, found.embedding_scale) == (wanted.max_position, wanted.embedding_scale)
        for number, (one, other) in enumerate(zip(found.layers, wanted.layers, strict=True)):
            assert shapes(found, number) == shapes(wanted, number)
            assert len(found.experts(number)) == len(wanted.experts(number))
            assert one.mlp == other.mlp
            assert rotary(one) == pytest.approx(rotary(other), rel=1e-6)
            for part in ("window", "n_heads", "n_kv_heads", "sinks"):
                assert getattr(one.mixer, part, None) == getattr(other.mixer, part, None), (number, part)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_first_layers_alone_are_planned(sparse: Path, name: str) -> None:
    path = packed.create(f"{name}:5", "mxfp4", 1)
    with closing(open_source(path)) as source:
        config = config_of(source)
        check_tensors(source, config)
        experts = [len(config.experts(layer)) for layer in range(config.n_layers)]
        assert experts == [len(PUBLISHED[name].model().experts(layer)) for layer in range(5)]
        if pages := config.experts(4):
            place = Place(1, 1, 2)
            alone = [source.plan(pages[expert], config, place) for expert in range(len(pages))]
            assert source.plan_experts(pages, config, place) == alone
    job = spec.load(
        None, ("memory.weights=8GiB", "memory.kv=1GiB"), model=str(path), input="in", output="out"
    )
    made = plan.make(job, 2)
    assert not made.problems
    assert sum(rank.weights_share for rank in made.ranks) > 0.4 * path.stat().st_size


def test_shapes_that_do_not_exist() -> None:
    for name in ("gpt-oss-20b:25", "gpt-oss-20b:0", "llama-1b:x", "gpt-oss"):
        with pytest.raises(JobError, match=f"There is no synthetic model {name} with mxfp4 weights"):
            synthetic_shapes.shape_named(name, "mxfp4")
