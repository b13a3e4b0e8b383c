"""`pack --weights bf12`: fewer bytes, the same answers, and what does not fit stays BF16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mpillm.engine.sequence import Request
from mpillm.errors import JobError
from mpillm.kernels import BlockType
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.tools.pack import pack
from mpillm.weights.fill import Rows
from mpillm.weights.finite import first_not_finite
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.roles import Key
from mpillm.weights.source import rank_plans
from tests.conftest import Mpi
from tests.model.checks import digest
from tests.model.engine_harness import _alone, run_engine
from tests.tools.packing import Quiet, packed
from tests.weights.build import Tiny, write_hf

DENSE = Tiny(hidden=512, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=64, intermediate=1024, vocab=256)
MIXTURE = Tiny(
    hidden=512, n_layers=1, n_heads=8, n_kv_heads=8, head_dim=64, vocab=64, n_experts=3, moe_intermediate=512
)
PROMPTS = (tuple(range(1, 40)), (5, 3, 9), tuple(range(60, 3, -5)))

# mpillm with a second rank that sees what an earlier run has left as BF16.
SEES_MORE = """
import os
import sys

from mpillm.cli import main
from mpillm.tools import pack
from mpillm.weights.roles import Key

if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    pack.kept_before = lambda folder, plans: {Key("k", 0), Key("k", 1)}
sys.exit(main(sys.argv[1:]))
"""


def written(model: Tiny, to: Path, odd: Sequence[str] = (), dtype: str = "BF16") -> Path:
    """The model in BF16; the matrices `odd` have values that no code can stand for."""
    tensors = {name: value / 20 if value.ndim == 2 else value for name, value in model.weights().items()}
    for name in odd:
        spread = np.float32(2) ** np.random.default_rng(3).integers(-90, 0, tensors[name].shape).astype(
            np.float32
        )
        tensors[name] = tensors[name] * spread
    config = model.config()
    if model.n_experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2}
        config |= {"num_local_experts": model.n_experts, "intermediate_size": model.moe_intermediate}
        names = {
            "mlp.gate": "block_sparse_moe.gate",
            "mlp.experts": "block_sparse_moe.experts",
            "gate_proj": "w1",
        }
        names |= {"up_proj": "w3", "down_proj": "w2"}
        for old, new in names.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return write_hf(to, tensors, config, dtype)


def answers(model: Path, **job: object) -> str:
    requests = [
        *(
            Request(f"scored-{i}", prompt, max_tokens=0, prompt_logprobs=3)
            for i, prompt in enumerate(PROMPTS)
        ),
        *(
            Request(f"drawn-{i}", prompt, max_tokens=6, temperature=1.0, seed=i)
            for i, prompt in enumerate(PROMPTS)
        ),
    ]
    return digest(run_engine(model, requests, threads=2, **job))


def types(model: Path) -> dict[Key, BlockType]:
    with closing(open_source(model)) as source:
        assert first_not_finite(source) is None
        return {key: info.type for key, info in source.tensors.items() if len(info.shape) == 2}


def test_answers_are_those_of_bf16_in_fewer_bytes(tmp_path: Path) -> None:
    """Where all stays in memory, and where as little as possible does."""
    model = written(DENSE, tmp_path / "m")
    plain, coded = (packed(model, tmp_path / name, name) for name in ("bf16", "bf12"))  # type: ignore[arg-type]
    assert coded.bytes < 0.85 * plain.bytes
    found = types(tmp_path / "bf12")
    assert found.pop(Key("embed")) is BlockType.BF16
    assert set(found.values()) == {BlockType.BF12}
    want = answers(model)
    with closing(open_source(tmp_path / "bf12")) as source:
        minimum = minimum_budget(rank_plans(config_of(source), Place(0, 1, 1), source))
    assert answers(tmp_path / "bf12") == want
    for loader in ("read", "mmap"):
        assert answers(tmp_path / "bf12", weights=minimum, loader=loader) == want


def test_a_matrix_that_does_not_fit_stays_bf16(tmp_path: Path) -> None:
    odd = "model.layers.1.self_attn.k_proj.weight"
    model = written(DENSE, tmp_path / "m", [odd])
    packed(model, tmp_path / "bf12", "bf12")
    found = types(tmp_path / "bf12")
    assert {key for key, type in found.items() if type is BlockType.BF16} == {Key("embed"), Key("k", 1)}
    assert answers(tmp_path / "bf12") == answers(model)


@pytest.mark.mpiexec
def test_hosts_that_do_not_see_the_same_files_of_an_earlier_run(mpi: Mpi, tmp_path: Path) -> None:
    """As on NFS for some seconds: all ranks plan the same files."""
    model = written(DENSE, tmp_path / "m")
    program = tmp_path / "program.py"
    program.write_text(SEES_MORE)
    done = mpi.run(2, program, "pack", model, tmp_path / "bf12", "--weights", "bf12")
    assert done.returncode == 0, done.stderr
    found = types(tmp_path / "bf12")
    assert {key for key, type in found.items() if type is BlockType.BF16} == {
        Key("embed"), Key("k", 0), Key("k", 1),
    }  # fmt: skip
    assert answers(tmp_path / "bf12") == answers(model)


def test_the_model_is_read_once_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file with a matrix that does not fit is packed again; the same command later reads no matrix."""
    read: list[Key] = []
    whole = TensorSource.rows_to_pack

    def counted(source: TensorSource, key: Key, rows: range, cols: range) -> Rows:
        read.append(key)
        return whole(source, key, rows, cols)

    monkeypatch.setattr(TensorSource, "rows_to_pack", counted)
    models = {
        name: written(DENSE, tmp_path / name, odd)
        for name, odd in {"even": [], "odd": ["model.layers.1.self_attn.k_proj.weight"]}.items()
    }
    packed(models["even"], tmp_path / "plain", "bf16")
    once, read[:] = sorted(read), []
    packed(models["even"], tmp_path / "coded", "bf12")
    assert sorted(read) == once
    read.clear()
    progress = Quiet()
    first = pack(_alone(), str(models["odd"]), tmp_path / "again", "bf12", progress)
    assert {key for key in read if read.count(key) > once.count(key)} <= {
        key for key in once if key.layer == 1
    }
    assert progress.seen[-1] == (first.bytes, first.bytes)
    read.clear()
    second = packed(models["odd"], tmp_path / "again", "bf12")
    assert (second.kept, second.bytes, read) == (first.files, first.bytes, [])


def test_experts_are_alike(tmp_path: Path) -> None:
    """One that does not fit keeps its layer's others of the kind BF16."""
    model = written(MIXTURE, tmp_path / "m", ["model.layers.0.mlp.experts.1.up_proj.weight"])
    packed(model, tmp_path / "bf12", "bf12")
    kinds: dict[str, set[BlockType]] = {}
    for key, type in types(tmp_path / "bf12").items():
        if key.expert >= 0:
            kinds.setdefault(key.role, set()).add(type)
    assert kinds == {"gate": {BlockType.BF12}, "up": {BlockType.BF16}, "down": {BlockType.BF12}}
    assert answers(tmp_path / "bf12") == answers(model)


def test_narrow_panels_stay_as_they_are(tmp_path: Path) -> None:
    """A head and steps of 32 columns would take more than 16 columns of BF16 do."""
    narrow = Tiny(hidden=16, n_heads=2, head_dim=8, intermediate=16)
    model = written(narrow, tmp_path / "m")
    packed(model, tmp_path / "bf12", "bf12")
    assert set(types(tmp_path / "bf12").values()) == {BlockType.BF16}
    assert answers(tmp_path / "bf12") == answers(model)


def test_a_model_without_bf16_is_refused(tmp_path: Path) -> None:
    model = written(Tiny(), tmp_path / "m", dtype="F16")
    with pytest.raises(JobError, match="has no matrices in BF16, which --weights bf12 needs"):
        packed(model, tmp_path / "bf12", "bf12")
