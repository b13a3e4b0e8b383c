"""Every architecture in every layout of the ranks there are: transformers' values, and the bytes recorded once."""

from __future__ import annotations

from typing import Any

import pytest

from mpillm.comm import parts
from mpillm.comm.world import World
from mpillm.model.decoder import Decoder
from tests.digests import recorded
from tests.digests.recorded import digest_of
from tests.model.checks import bounds_of, check, requests_of, sampled
from tests.model.engine_harness import layouts, run_laid_out, vocab_of
from tests.model.golden import GGUFS, MODELS, PLAIN_GGUFS, golden, may_be_quantised, path_of

ALL = [*MODELS, *(f"{name}.gguf" for name in GGUFS)]
FEW = ["llama3", "qwen3_moe", "smol_bf16", "llama_mixed.gguf"]
MANY_RANKS = ["llama3", "qwen3_moe", "llama_mixed.gguf"]  # those on more than four


@pytest.mark.mpi
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_every_layout(name: str, world: World) -> None:
    """By default nothing depends on the layout; the Q8_0 wires change only what travels over them."""
    if world.size > 4 and name not in MANY_RANKS:
        pytest.skip("on many ranks a few models suffice")
    path, reference = path_of(name), golden(name)
    graded = requests_of(reference)
    compared = [*graded, *sampled(reference)]
    requests = [*compared, *recorded.requests(vocab_of(path))]
    first = len(compared)  # of those that were recorded
    exact = not name.endswith(".gguf") or name.removesuffix(".gguf") in PLAIN_GGUFS
    known = name + (" kv=f32" if may_be_quantised(name) else "")
    job: dict[str, Any] = {"kv_type": "f32"}
    for stages, shards in layouts(path, world.size):
        job |= {"stages": stages, "shards": shards}
        for wire in ("auto", "q8_0"):
            completions, session = run_laid_out(world, path, requests, **job, activations=wire)
            assert session.wire == ("q8_0" if wire == "q8_0" else "f32")
            if world.rank > 0:
                continue
            check(reference, completions[: len(graded)], bounds_of(name, not exact or wire == "q8_0"))
            rounded = f" wire=q8_0 shards={shards}" if wire == "q8_0" and shards > 1 else ""
            found = {f"{known}{rounded}": digest_of(completions[first:])}
            if not rounded:
                found[f"{known} reference"] = digest_of(completions[:first])
            recorded.check(found)
            assert not rounded or found[known + rounded] != recorded.recorded()[known]
        if stages > 1:
            completions, _ = run_laid_out(world, path, requests[first:], **job, between_stages="q8_0")
            if world.rank == 0:
                recorded.check({f"{known} between=q8_0 stages={stages}": digest_of(completions)})


@pytest.mark.mpi(min_size=2)
def test_rows_in_lanes_have_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a prompt, and of several sequences, are cut anywhere: one lane computes while another is summed."""
    if world.size.bit_count() > 1:
        pytest.skip("shards are a power of two")
    path = path_of("llama3")
    requests = recorded.requests(vocab_of(path))
    found, messages = [], []
    for seconds in (1.0, 0.0):
        monkeypatch.setattr(parts, "LANES", seconds)
        monkeypatch.setattr(parts, "LANE_ROWS", 2)
        completions, session = run_laid_out(
            world, path, requests, stages=1, shards=world.size, activations="q8_0"
        )
        found.append(digest_of(completions) if world.rank == 0 else "")
        messages.append(session.counters.all_reduce.messages)
    assert found[0] == found[1]
    assert messages[1] > messages[0]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("how", ["streams", "has new weights"])
def test_shards_of_which_one_computes_layers_apart(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Messages have one size on all: that of a lane, also where a rank does not compute between its lanes."""
    if world.size.bit_count() > 1:
        pytest.skip("shards are a power of two")
    monkeypatch.setattr(parts, "LANES", 0.0)
    monkeypatch.setattr(parts, "LANE_ROWS", 2)
    path = path_of("llama3")
    requests = recorded.requests(vocab_of(path))
    job: dict[str, Any] = {"stages": 1, "shards": world.size, "activations": "q8_0"}
    alike, session = run_laid_out(world, path, requests, **job)
    if how == "streams":
        largest = [f"{total // 2**10 + 1}KiB" for total in world.gather(session.weights.total)]
        job["weights"] = [*largest[:-1], f"{session.weights.total * 3 // 4 // 2**10}KiB"]
    elif world.rank == world.size - 1:  # before each step, as once when the loader has packed all weights
        monkeypatch.setattr(Decoder, "renew_weights", Decoder._forget_pages)
    completions, session = run_laid_out(world, path, requests, **job)
    if how == "streams":
        assert session.streamed[-1]
        assert not any(session.streamed[:-1])
    if world.rank == 0:
        assert digest_of(completions) == digest_of(alike)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("ranks", [2, 4])
def test_there_are_layouts_of_every_kind(ranks: int) -> None:
    found = [layout for name in ALL for layout in layouts(path_of(name), ranks)]
    # Every model in stages, and most of them in shards: not those whose quantised blocks leave too few panels.
    assert len(found) > 1.5 * len(ALL)
    assert sum(shards == 1 for _, shards in found) >= 4  # few of them have four layers
    assert sum(shards > 1 for _, shards in found) > 0.5 * len(ALL)
