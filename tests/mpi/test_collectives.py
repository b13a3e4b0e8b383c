"""Every message of a step, on every layout that these ranks allow."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from mpillm.comm.channel import Channel, Pipe
from mpillm.comm.collectives import Group
from mpillm.comm.counters import MessageCounters
from mpillm.comm.exchange import HEAD, LENGTH
from mpillm.comm.parts import EAGER
from mpillm.comm.shared import shared_rows
from mpillm.comm.transfer import Tag, Wire, WireError
from mpillm.comm.world import UNUSED_TAG, World
from mpillm.errors import JobError
from mpillm.kernels import BlockType, dequantize, fold, quantize
from mpillm.partition.grid import Axis, Place, panel_bounds

F32 = npt.NDArray[np.float32]
PANELS = 8
pytestmark = pytest.mark.mpi

SHAPES = ((1, 576), (5, 96), (3, 33), (64, 2000), (2, 20000))


def test_objects_of_any_size_reach_all_ranks(world: World) -> None:
    """Small ones go in one message; HEAD counts their length and the bytes by which pickle makes them longer."""
    sizes = [0, HEAD - LENGTH - 20, HEAD - LENGTH, HEAD, 100_000]
    for size in sizes:
        own = bytes([world.rank]) * size
        assert world.gather(own) == [bytes([rank]) * size for rank in range(world.size)]
        last = world.size - 1
        assert world.bcast(own, last) == bytes([last]) * size
    mixed = [bytes(sizes[rank % len(sizes)]) for rank in range(world.size)]
    assert world.gather(mixed[world.rank]) == mixed
    with pytest.raises(JobError, match=r"^no such file$"):
        world.on_rank_0(_refuse)


def _refuse() -> None:
    raise JobError("no such file")


def test_a_message_goes_on_while_its_sender_waits_for_shared_memory(world: World, tmp_path: Path) -> None:
    """MPICH sends the end of one of about 8 KiB later, and not in a probe that finds a message which has come early."""
    from mpi4py import MPI

    assert UNUSED_TAG not in set(Tag)
    folder, comm, other = Path(world.bcast(str(tmp_path), 0)), world.comm, world.rank ^ 1
    if other >= world.size:
        return
    for nbytes in range(8000, 8400, 16):
        told = folder / f"{min(world.rank, other)}-{nbytes}"
        if world.rank % 2:
            comm.Send([b"early", MPI.BYTE], other, Tag.REPLY)
            comm.Recv([bytearray(nbytes), MPI.BYTE], other, Tag.STEP)
            told.touch()
            continue
        while not comm.Iprobe(other, Tag.REPLY):
            time.sleep(1e-4)
        request, calls = comm.Isend([bytes(nbytes), MPI.BYTE], other, Tag.STEP), itertools.count()

        def arrived(
            spin: float, sleep: float, told: Path = told, calls: itertools.count[int] = calls
        ) -> bool:
            time.sleep(spin + sleep)
            return told.exists() or next(calls) > 5000  # some ten seconds

        world.wait_for_flags(arrived, [other])
        assert told.exists(), nbytes
        request.Wait()
        comm.Recv([bytearray(5), MPI.BYTE], other, Tag.REPLY)


@pytest.fixture(params=[1, 2, 4, 8])
def place(request: pytest.FixtureRequest, world: World) -> Place:
    """This rank's place where a stage has so many shards."""
    if world.size % request.param:
        pytest.skip(f"{world.size} ranks are no stages of {request.param}")
    return Place(world.rank, world.size // request.param, request.param)


WIRES = pytest.mark.parametrize("wire", ["f32", "q8_0"])


def tree(parts: F32) -> F32:
    """The oracle: neighbours are added until one is left."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    total: F32 = parts[0]
    return total


def through_q8_0(x: F32) -> F32:
    blocks = np.empty((len(x), BlockType.Q8_0.row_bytes(x.shape[1])), np.uint8)
    quantize(BlockType.Q8_0, x, blocks, 1)
    back = np.empty_like(x)
    dequantize(BlockType.Q8_0, blocks, x.shape[1], back, 1)
    return back


def through_sums(x: F32) -> F32:
    """What Q8_0 leaves out goes as Q4_0."""
    coarse = through_q8_0(x)
    blocks = np.empty((len(x), BlockType.Q4_0.row_bytes(x.shape[1])), np.uint8)
    quantize(BlockType.Q4_0, x - coarse, blocks, 1)
    rest = np.empty_like(x)
    dequantize(BlockType.Q4_0, blocks, x.shape[1], rest, 1)
    total: F32 = coarse + rest
    return total


def own_part(panels: F32, place: Place) -> F32:
    """What a shard brings: the sum of its own panels, folded inside the rank."""
    count = len(Axis(panel_bounds(PANELS, 1, PANELS)).own_panels(place)) - 1
    part = np.empty(panels.shape[1:], np.float32)
    fold(panels[place.shard * count : (place.shard + 1) * count].copy(), part, 1)
    return part


@pytest.mark.parametrize(
    ("wire", "rate"), [("f32", 1), ("f32", 1e8), ("q8_0", 1), ("q8_0", 1e8), ("shared", 1)]
)
def test_sums_are_the_tree(
    world: World, place: Place, wire: Literal["f32", "q8_0", "shared"], rate: float
) -> None:
    """Whether all shards sum or one does; shared memory takes large rows in pieces, and none of the widest."""
    shared = shared_rows(world, world, place, 4 * 7 * 2000) if wire == "shared" else None
    assert (shared is None) == (wire != "shared" or place.shards == 1)
    counters = MessageCounters()
    group = Group(world, place, "q8_0" if wire == "q8_0" else "f32", counters, shared=shared, rate=rate)
    for seed, (m, d) in enumerate(SHAPES):
        random = np.random.default_rng([seed, place.stage])  # the shards of a stage share the panels
        panels = random.standard_normal((PANELS, m, d), np.float32) * random.choice(
            [1e-3, 1, 50], (PANELS, 1, 1)
        )
        panels = panels.astype(np.float32)
        everyone = [own_part(panels, Place(place.stage * place.shards + s, place.stages, place.shards))
                    for s in range(place.shards)]  # fmt: skip
        x = everyone[place.shard].copy()
        group.all_reduce(x)
        if wire != "q8_0" or place.shards == 1:
            assert np.array_equal(x, tree(panels)), f"{place} {wire} {m} x {d}"
        else:
            sums = tree(np.stack([through_q8_0(part) for part in everyone]))
            assert np.array_equal(x, sums if place.shards == 2 else through_sums(sums))
        copies = world.gather((place.stage, x.tobytes()))
        assert len(set(copies)) == place.stages, "the shards of a stage have the same bytes"
    if wire != "q8_0":
        # Messages of more than two shards are pieces; shared memory does not take the widest rows.
        values, pieces = sum(m * d for m, d in SHAPES), 0
        if place.shards > 2:
            pieces = values if wire == "f32" else SHAPES[-1][0] * SHAPES[-1][1]
        expected = 4 * (place.shards - 1) * ((values - pieces) * place.shards + 2 * pieces) * place.stages
        count = counters.all_reduce
        assert [sum(world.gather(own)) for own in (count.bytes_sent, count.bytes_received)] == [expected] * 2


@WIRES
def test_pipes_carry(world: World, place: Place, wire: Wire) -> None:
    counters = MessageCounters()
    pipe = Pipe(world, place, wire, counters)
    for seed, (m, d) in enumerate(SHAPES):
        start = np.random.default_rng([seed, place.shard]).standard_normal((m, d)).astype(np.float32)
        x = start.copy() if place.is_first_stage else pipe.recv(m, d)
        expected = start
        for _ in range(place.stage):
            expected = (expected if wire == "f32" else through_q8_0(expected)) + np.float32(1)
        if not place.is_first_stage:
            x += np.float32(1)
        assert np.array_equal(x, expected)
        if not place.is_last_stage:
            pipe.send(x)
            x.fill(np.nan)  # what is under way is a copy
    pipe.progress()
    values = sum(m * d for m, d in SHAPES)
    sends, receives = not place.is_last_stage, not place.is_first_stage
    assert counters.pipe.messages == sends * len(SHAPES)
    if wire == "f32":
        assert (counters.pipe.bytes_sent, counters.pipe.bytes_received) == (
            4 * sends * values,
            4 * receives * values,
        )


@WIRES
def test_many_steps_in_flight(world: World, place: Place, wire: Wire) -> None:
    """Rank 0 orders all steps before it collects the first reply; orders are empty, small and large.

    Where sums go through shared memory, who waits for them moves the orders on.
    """
    counters = MessageCounters()
    channel = Channel(world, counters)
    shared = shared_rows(world, world, place, 1 << 16) if wire == "f32" else None
    group, pipe = Group(world, place, wire, counters, shared=shared), Pipe(world, place, wire, counters)
    steps = [(1, b""), (64, b"x" * 200_000), (2, bytes(range(24))), (7, b"y"), (300, b"z" * 70_000)]
    own: list[bytes] = []  # what rank 0 has to say itself
    for number, (m, order) in enumerate(steps):
        if world.rank == 0:
            channel.post(order)
        else:
            assert channel.take() == order
        x = np.full((m, 256), number, np.float32) if place.is_first_stage else pipe.recv(m, 256)
        part = x / np.float32(place.shards)
        group.all_reduce(part)
        answer = bytes([number, place.shard]) * m + part.tobytes()
        if not place.is_last_stage:
            pipe.send(part)
        elif world.rank > 0:
            channel.reply(answer)
        else:
            own.append(answer)
    if world.rank == 0:
        for number, (m, _) in enumerate(steps):
            for shard in range(place.shards):
                source = (place.stages - 1) * place.shards + shard
                answer = channel.collect(source) if source else own[number]
                assert answer[: 2 * m] == bytes([number, shard]) * m
                assert np.allclose(np.frombuffer(answer[2 * m :], np.float32), number, rtol=0.02)
        sent = sum(len(order) for _, order in steps)
        assert counters.step.messages == len(steps) * (world.size - 1)
        assert counters.step.bytes_sent == sent * (world.size - 1)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_are_out_of_step_are_noticed_in_shared_memory(world: World) -> None:
    place = Place(world.rank, 1, world.size)
    shared = shared_rows(world, world, place, 1 << 12)
    assert shared is not None
    assert shared.capacity == 1 << 10
    group = Group(world, place, "f32", MessageCounters(), shared=shared)
    x = np.ones((2 if world.rank else 1, 96), np.float32)
    with pytest.raises(WireError, match=r"rank \d sent \d+ bytes where \d+ were expected"):
        group.all_reduce(x)


@pytest.mark.mpi(min_size=2)
@WIRES
def test_few_rows_are_summed_by_one_shard(world: World, wire: Wire) -> None:
    """The fewest messages, of as many bytes as pieces have; the slower the network, the smaller pieces are worth it."""
    if world.size not in (4, 8):
        pytest.skip(f"{world.size} ranks are no shards, or each other's copies")
    place, counters = Place(world.rank, 1, world.size), MessageCounters()
    of_pieces = MessageCounters()
    for rate, count in ((1e10, counters), (1e5, of_pieces)):
        group = Group(world, place, wire, count, rate=rate)
        group.all_reduce(np.ones((1, 2048), np.float32))
    others = world.size - 1
    assert counters.all_reduce.messages == (1 if world.rank else others)
    assert of_pieces.all_reduce.messages == 2 * others
    assert sum(world.gather(counters.all_reduce.bytes_sent)) == sum(
        world.gather(of_pieces.all_reduce.bytes_sent)
    )


@pytest.mark.mpi(min_size=2)
@WIRES
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("backwards", [False, True])
def test_several_sums_are_under_way(
    world: World, wire: Wire, rows: int, backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end in the order in which they began, with the bytes of one after the other, however MPI starts a sum's
    messages: it may do so in any order."""
    if world.size not in (2, 4, 8):
        pytest.skip(f"{world.size} ranks are no shards")
    from mpi4py import MPI  # once there is a world

    if backwards and world.rank:
        start = MPI.Prequest.Startall
        other = SimpleNamespace(Startall=lambda requests: start(requests[::-1]))
        monkeypatch.setattr(MPI, "Prequest", other)
    place, counters = Place(world.rank, 1, world.size), MessageCounters()
    group = Group(world, place, wire, counters, rate=1e6, whole=True)
    random = np.random.default_rng(world.rank)
    turns = [random.standard_normal((rows, 512)).astype(np.float32) for _ in range(6)]
    expected = [x.copy() for x in turns]
    for x in expected:
        group.all_reduce(x)
    before = counters.all_reduce.messages
    ends = [group.begin(turns[0], 0)]
    for number, x in enumerate(turns[1:], 1):
        ends.append(group.begin(x, number % 2))
        ends[number - 1]()
    ends[-1]()
    assert group.lanes(*turns[0].shape) == [0, rows]
    assert all(np.array_equal(*pair) for pair in zip(turns, expected, strict=True))
    assert counters.all_reduce.messages == 2 * before
    # Large ones leave in pieces that need no answer.
    sums = rows * 512 * (4 if wire == "f32" else 34 / 32)
    if world.size == 2:
        assert before == 6 * math.ceil(sums / EAGER)


@pytest.mark.mpi(min_size=2)
def test_q8_0_saves_its_share(world: World) -> None:
    """34 bytes for 32 values instead of 128, and 52 for sums, which add next to no error."""
    if world.size not in (2, 4, 8):
        pytest.skip(f"{world.size} ranks are no shards")
    place = Place(world.rank, 1, world.size)
    x = np.random.default_rng(world.rank).standard_normal((8, 1024)).astype(np.float32)
    carried, sums = {}, {}
    for wire in ("f32", "q8_0"):
        counters = MessageCounters()
        sums[wire] = x.copy()
        Group(world, place, wire, counters, rate=1.0).all_reduce(sums[wire])
        count = counters.all_reduce
        assert count.messages == (1 if world.size == 2 else 2 * (world.size - 1))
        assert count.bytes_sent == count.bytes_received
        carried[wire] = count.bytes_sent
    assert carried["f32"] == 4 * x.size * 2 * (world.size - 1) // world.size
    saved = 73.4 if world.size == 2 else 66.4
    assert round(100 * (1 - carried["q8_0"] / carried["f32"]), 1) == saved
    parts = np.stack(world.gather(x))
    rounded = tree(np.stack([through_q8_0(part) for part in parts]))
    error, of_parts = (np.mean((found - sums["f32"]) ** 2) for found in (sums["q8_0"], rounded))
    assert error < 1.05 * of_parts < 1e-4 * world.size
