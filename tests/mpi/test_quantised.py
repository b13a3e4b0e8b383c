"""Quantised checkpoints from their files to their answers, in every layout, against a twin on what they stand for."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpillm.comm.world import World
from mpillm.kernels import BlockType
from mpillm.kernels.blocks import quantise_panel
from mpillm.partition.grid import panel_bounds
from tests.digests import recorded
from tests.digests.recorded import digest_of
from tests.model.engine_harness import layouts, run_laid_out
from tests.model.oracle import Array, Oracle, through_activation_blocks
from tests.weights.build import Tiny, write_hf
from tests.weights.test_quantised import CASES, WIDE, checkpoint

# One of each method and of each type that matrices become. MXFP4 of gpt-oss is among the models of test_models.py.
ENDS = [
    "fp8 blocks",
    "gptq 64",
    "gptq act-order",
    "awq",
    "int8",
    "nvfp4 modelopt",
    "mxfp4",
    "nf4 nested",
    "llm.int8",
    "w8a8",
]


FEW = {BlockType.F16: "400KiB", BlockType.FP8: "1500KiB", BlockType.NVFP4: "1MiB", BlockType.NF4: "1MiB"}


class Dequantised(Oracle):
    """A twin on dequantised values; what meets a matrix of a layer is rounded as for matrices of the type."""

    def __init__(self, folder: Path, type: BlockType) -> None:
        super().__init__(folder)
        self.type = type

    def _linear(self, x: Array, name: str) -> Array:
        if "layers" in name and self.type.whole:
            x = through_panels(x, 8 if "o_proj" in name or "down_proj" in name else 4)
        elif "layers" in name and self.type.quantised:
            x = through_activation_blocks(x)
        return super()._linear(x, name)


def through_panels(x: Array, most: int) -> Array:
    """Values of x [m, k] after quantisation for W8A8, in up to so many panels."""
    k = x.shape[1]
    count = min(most, 1 << ((k // 32).bit_length() - 1))
    rounded = np.empty_like(x)
    for begin, end in itertools.pairwise(panel_bounds(k, 32, count)):
        of, q = quantise_panel(x[:, begin:end].astype(np.float32))
        whole = q.astype(np.float64)
        whole.reshape(len(x), -1, 4)[np.arange(len(x)), of["group"]] += 128.0 * of["high"][:, :4]
        rounded[:, begin:end] = whole * of["scale"][:, None]
    return rounded


@pytest.fixture(scope="module")
def folder(world: World) -> Iterator[Path]:
    """One that all ranks see."""
    made = tempfile.TemporaryDirectory() if world.rank == 0 else None
    yield Path(world.bcast(made.name if made else ""))
    world.barrier()
    if made:
        made.cleanup()


@pytest.mark.mpi
@pytest.mark.parametrize("case", ENDS)
def test_answers_are_those_of_the_dequantised_model(case: str, folder: Path, world: World) -> None:
    """Log-probabilities, and the same bytes in all layouts, or of one rank under a small budget too."""
    _, _, type, bound = CASES[case]
    narrow = Tiny(hidden=192, intermediate=320, n_heads=6, n_kv_heads=2, head_dim=32, n_layers=2)
    model = replace(WIDE, n_layers=2) if type.scaled else narrow
    quantised, plain = folder / case, folder / f"{case} dequantised"
    if world.rank == 0:
        values = checkpoint(quantised, case, model, "F32")
        if type is BlockType.F16:
            values = {name: value.astype(np.float16).astype(np.float32) for name, value in values.items()}
        write_hf(plain, model.weights() | values, model.config())
    world.barrier()
    requests = recorded.requests(model.vocab)[:5]
    digests = set()
    ways = layouts(quantised, world.size)
    if not ways:
        pytest.skip(f"{world.size} ranks cannot share two layers")
    for stages, shards in ways:
        few = "200KiB" if type.quantised else FEW[type]
        for weights in ("all", few)[: 2 if world.size == 1 else 1]:
            job = {"stages": stages, "shards": shards, "weights": weights, "kv_type": "f32"}
            completions, session = run_laid_out(world, quantised, requests, activations="f32", **job)
            assert weights == "all" or session.weights.streamed > 0
            digests.add(digest_of(completions) if completions else "")
    assert len(digests) == 1
    if world.rank > 0:
        return
    oracle = Dequantised(plain, type)
    errors = []
    for one in completions:
        ids = list(one.request.prompt)
        if one.prompt_logprobs:
            table = oracle.logprobs(ids)
            errors += np.abs(table[np.arange(len(ids) - 1), ids[1:]] - one.prompt_logprobs).tolist()
    assert len(errors) > 70
    # Where activations are rounded, a last digit may be rounded the other way; where scales are too, many are.
    maximum = 2e-4 if not type.quantised else 0.2 if bound else 5e-3
    assert np.median(errors) < (maximum / 4 if bound else 1e-5)
    assert max(errors) < maximum
