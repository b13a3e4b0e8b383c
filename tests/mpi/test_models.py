"""Every architecture on 1 to 8 ranks, in every layout, with real mpiexec: transformers' values, and the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Mpi, get_mpi
from tests.digests import recorded
from tests.model.golden import GGUFS, MODELS

PROGRAM = Path(__file__).with_name("models.py")
ALL = [*MODELS, *(f"{name}.gguf" for name in GGUFS)]
FEW = ["llama3", "qwen3_moe", "smol_bf16", "llama_mixed.gguf"]

pytestmark = pytest.mark.mpi


def run(mpi: Mpi, ranks: int, names: list[str], folder: Path, **env: str) -> dict[str, str]:
    """The digests of a run, by "model wire layout"; what was recorded once is as it was."""
    target = folder / f"{mpi.name}-{ranks}.json"
    done = mpi.run(ranks, PROGRAM, target, *names, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    digests: dict[str, dict[str, str]] = json.loads(target.read_text())
    recorded.check(digests["recorded"])
    return digests["all"]


def by_layout(digests: dict[str, str], name: str, wire: str) -> dict[tuple[int, int], str]:
    found = {}
    for key, digest in digests.items():
        model, kind, layout = key.split()
        if (model, kind) == (name, wire):
            stages, shards = layout.split("x")
            found[int(stages), int(shards)] = digest
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All models on one rank, where nothing travels."""
    return run(get_mpi("openmpi"), 1, ALL, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def digests(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All models in all layouts of so many ranks."""
    return run(get_mpi("openmpi"), ranks, ALL, tmp_path_factory.mktemp("ranks"))


def test_all_models_on_all_layouts(digests: dict[str, str], alone: dict[str, str]) -> None:
    laid_out = 0
    for name in ALL:
        expected = alone[f"{name} f32 1x1"]
        exact = by_layout(digests, name, "f32")
        laid_out += len(exact)
        assert set(exact.values()) <= {expected}, f"{name}: {exact}"
    # Every model in stages, and most of them in shards: not those whose quantised blocks leave too few panels.
    assert laid_out > 1.5 * len(ALL)


def test_only_what_shards_sum_is_rounded(digests: dict[str, str], alone: dict[str, str]) -> None:
    stages_alone, shards = 0, 0
    for name in ALL:
        for (_, n_shards), digest in by_layout(digests, name, "q8_0").items():
            if n_shards == 1:
                assert digest == alone[f"{name} f32 1x1"], name
                stages_alone += 1
            else:
                assert digest != alone[f"{name} f32 1x1"], name
                shards += 1
    assert stages_alone >= 4  # few of them have four layers
    assert shards > 0.5 * len(ALL)


@pytest.mark.parametrize("ranks", [3, 6, 8])
def test_other_numbers_of_ranks(ranks: int, alone: dict[str, str], tmp_path: Path) -> None:
    digests = run(get_mpi("openmpi"), ranks, FEW, tmp_path)
    assert digests
    for key, digest in digests.items():
        name, wire, _ = key.split()
        if wire == "f32":
            assert digest == alone[f"{name} f32 1x1"], key


def test_the_other_mpi(mpich: Mpi, alone: dict[str, str], tmp_path: Path) -> None:
    digests = run(mpich, 4, FEW, tmp_path)
    for name in FEW:
        exact = by_layout(digests, name, "f32")
        assert set(exact.values()) == {alone[f"{name} f32 1x1"]}, name
