"""The same bits from several ranks, whose steps overlap: with shared prefixes, and with preemption among them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpillm.bench import synthetic
from mpillm.kernels import BlockType
from mpillm.model.opening import open_source
from mpillm.weights.roles import Key
from tests.agnostic.harness import write_mixed_windows
from tests.agnostic.program import digest
from tests.agnostic.test_same_bits import COMPILED, TIGHT, expected
from tests.conftest import Mpi
from tests.weights.build import Tiny, write_hf

PROGRAM = Path(__file__).with_name("program.py")
WAYS: list[dict[str, Any]] = [
    {},
    {"prefix_sharing": False, "speculation": "prompt-lookup"},
    {"kv_blocks": TIGHT, "max_num_seqs": 7, "speculation": "prompt-lookup"},
    {"kv_blocks": TIGHT, "max_num_seqs": 7, "prefix_sharing": False, "max_num_batched_tokens": 40},
    {"max_num_seqs": 7, "speculation": "always", "draft": "none"},
]

pytestmark = [
    pytest.mark.mpiexec,
    pytest.mark.skipif(not COMPILED, reason="the extension is not built, and NumPy's products promise less"),
]


@pytest.mark.parametrize(
    ("model", "stages", "shards"),
    [("llama3", 2, 1), ("llama3", 2, 2), ("llama_mixed.gguf", 2, 1), ("mixed windows", 2, 1)],
)
def test_same_bits(model: str, stages: int, shards: int, openmpi: Mpi, tmp_path: Path) -> None:
    target = tmp_path / "outcomes.json"
    if model == "mixed windows":
        model = str(write_mixed_windows(tmp_path / "model"))
    layout = {"stages": stages, "shards": shards, "activations": "f32"}
    settings = [json.dumps({**layout, **way}) for way in WAYS]
    done = openmpi.run(stages * shards, PROGRAM, target, model, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(target.read_text())
    for way, outcome in zip(WAYS, made, strict=True):
        assert outcome["digest"] == digest(expected(model)), way
        totals = outcome["totals"]
        assert (totals["shared_tokens"] > 0) is way.get("prefix_sharing", True)
        if "draft" in way:
            assert totals["accepted"]["model"] > 0
        elif "speculation" in way:
            assert sum(totals["drafted"].values()) > sum(totals["accepted"].values()) > 0
        if "kv_blocks" in way:
            assert totals["preemptions"] > 0


@pytest.mark.parametrize(("windows", "stages", "shards"), [(False, 2, 1), (True, 1, 2)])
def test_a_kv_cache_on_disk(windows: bool, stages: int, shards: int, openmpi: Mpi, tmp_path: Path) -> None:
    tiny = Tiny(n_layers=12, vocab=300)
    if windows:
        model = str(write_mixed_windows(tmp_path / "model"))
    else:
        model = str(write_hf(tmp_path / "model", tiny.weights(), tiny.config()))
    target = tmp_path / "outcomes.json"
    job = {"stages": stages, "shards": shards, "activations": "f32", "kv_blocks": TIGHT}
    spills = {**job, "streams": True, "kv_spill": "1GiB", "spill_dir": str(tmp_path)}
    done = openmpi.run(stages * shards, PROGRAM, target, model, json.dumps(job), json.dumps(spills))
    assert done.returncode == 0, done.stderr[-3000:]
    without, with_it = json.loads(target.read_text())
    assert with_it["digest"] == without["digest"] == digest(expected(model))
    assert with_it["spill_read"] > 0 == without["spill_read"]
    assert with_it["totals"]["steps"] < without["totals"]["steps"]


def test_k_quants_over_shards(openmpi: Mpi, tmp_path: Path) -> None:
    """Columns of o and down that suffice for eight panels of whole blocks stay what they are, and are shared out."""
    path = tmp_path / "model.gguf"
    synthetic.write(path, "wide", synthetic.Shape("llama", 256, 2, 32, 8, 64, 2048, 300), "q4_k_m")
    with closing(open_source(path)) as source:
        types = {source.tensors[Key(role, layer)].type for role in ("o", "down") for layer in range(2)}
    assert types == {BlockType.Q4_K, BlockType.Q6_K}
    target = tmp_path / "outcomes.json"
    for shards in (2, 4):
        settings = json.dumps({"shards": shards, "activations": "f32", "threads": 1})
        done = openmpi.run(shards, PROGRAM, target, path, settings)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(target.read_text())[0]["digest"] == digest(expected(str(path)))
