"""Measure how fast this rank computes: products, attention, operations on rows, memory, plain code."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.comm.core_speed import LOOK_TURNS, TURNS, WHOLE, core_speed, plain_code, typical
from mpillm.kernels import KV_BLOCK, Activation, BlockType, KvType
from mpillm.planning.speed import ROWS, WIDTH, Products
from mpillm.weights.io.reading import new_buffer
from mpillm.weights.plan import ALIGNMENT, aligned, panels_of_rows

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NUMPY_WIDTH = 256  # columns of a matrix without the compiled kernels
MEMORY = 128 * 2**20  # bytes of memory and of matrices that are read; few caches are as large
PIECE = 4 * 2**20  # bytes that one call reads or writes
SECONDS = 0.06  # seconds of each timing
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
# Attention: sequences with a row each, and the tokens that a row attends to; or the rows of a prompt. There are fewer
# tokens if the effort is less than 1.
SEQUENCES, CONTEXT, SHORT_CONTEXT = 8, 512, 128
VALUE_ROWS = 64
FILLING = 0.04  # seconds for writing new memory
BRIEFLY = 0.25  # the part of them if the effort is less than 1
PERIODS = 0.2  # seconds of two periods of a control group's quota


@dataclass(frozen=True)
class KernelRates:
    """The rates of one rank, with fields as in `Speed`; `memory` is 0 without the compiled kernels."""

    products: Products
    memory: float
    attention: tuple[float, float]
    values: float
    fill: float
    core: float


def kernel_rates(
    kinds: Sequence[str],
    threads: int,
    nbytes: int = MEMORY,
    effort: float = 1.0,
    most: int = 0,
    meet: Callable[[], None] = lambda: None,
    quota: float = 1.0,
) -> KernelRates:
    """Measure the rates of this rank, in about a second times `effort`.

    `kinds` names the block types whose products are measured, without those of the most rows if `effort` is less than
    1. Timings read `nbytes` bytes of memory, and up to `most` bytes of new memory are written. All ranks call `meet`
    before they measure which part of a core each thread has; it is at most `quota`.
    """
    seconds, brief = SECONDS * effort, effort < 1
    began, used = time.perf_counter(), time.thread_time()
    compiled = kernels.path() != "numpy"
    # Timings follow each other, so that they never hold more than `nbytes` bytes.
    tokens = _context(nbytes, SHORT_CONTEXT if brief else CONTEXT) if compiled else KV_BLOCK
    attention = _attention(tokens, threads, seconds)
    values = _values(threads, seconds)
    core = core_speed(seconds, LOOK_TURNS if brief else TURNS)
    everything = new_buffer(max(nbytes, most) if compiled else PIECE, ALIGNMENT)
    fill = threads * _fill(everything, nbytes, FILLING * (BRIEFLY if brief else 1.0))
    memory = everything[:nbytes]
    sizes = ROWS[:-1] if brief else ROWS
    products = {name: _products(BlockType[name.upper()], sizes, memory, threads, seconds) for name in kinds}
    read = _memory(memory, threads, seconds)
    used, passed = time.thread_time() - used, time.perf_counter() - began
    meet()
    part = part_of_core(used, passed, _measured_part, quota)
    return KernelRates(
        {name: [part * rate for rate in rates] for name, rates in products.items()},
        part * read,
        (part * attention[0], part * attention[1]),
        part * values,
        part * fill,
        part * core,
    )


def part_of_core(used: float, passed: float, again: Callable[[], float], quota: float = 1.0) -> float:
    """Return the part of a core that a thread has: it ran for `used` of the last `passed` seconds.

    A control group's quota stops a thread repeatedly, and so do ranks that share its core; `typical` does not count
    that. The disturbance by other programs is usually shorter, so a part below WHOLE of the known quota is measured
    `again`. That takes whole periods of a quota, which may be hidden: in one and a half periods a thread can run for
    the quota of two.
    """
    part = used / passed
    if part < WHOLE * quota:
        part = again()
    return part if part < WHOLE * quota else quota


def _measured_part() -> float:
    """Return the part of a core that this thread has during PERIODS seconds (a period of a quota is usually 0.1 s)."""
    began, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < PERIODS:
        plain_code(LOOK_TURNS)
    return (time.thread_time() - used) / (time.perf_counter() - began)


def _fill(memory: Bytes, least: int, seconds: float) -> float:
    """Bytes/s at which one core writes new memory, with the time in which the system provides its pages.

    Pages that were freed a moment ago may come faster than others, so the rate is that of as much memory as there is
    time for, and of at least `least` bytes.
    """
    used, done = time.thread_time(), 0
    while done < len(memory) and (done < least or time.thread_time() - used < seconds):
        memory[done : done + PIECE] = 0
        done += PIECE
    return min(done, len(memory)) / max(time.thread_time() - used, 1e-9)


def _products(
    kind: BlockType, sizes: Sequence[int], memory: Bytes, threads: int, seconds: float
) -> list[float]:
    """Operations/s of products with each number of rows in `sizes`; the matrices are side by side in `memory`."""
    height = width = NUMPY_WIDTH if kernels.path() == "numpy" else WIDTH
    bounds = np.array(panels_of_rows(kind, width), np.int32)
    # The matrices fill the memory. If it is too small for one, the matrix has fewer rows.
    while (nbytes := kernels.packed_nbytes(kind, height, width, bounds)) > memory.nbytes:
        height //= 2
    matrices = [memory[at : at + nbytes] for at in range(0, memory.nbytes - nbytes + 1, aligned(nbytes))]
    kernels.pack(kind, np.zeros((height, kind.row_bytes(width)), np.uint8), width, bounds, matrices[0])
    for matrix in matrices[1:]:
        matrix[:] = matrices[0]
    rates = []
    for rows in sizes:
        values = np.zeros((rows, width), np.float32)
        x: NDArray[np.generic] = values
        if kind.quantised:
            x = blocks = np.empty((rows, kernels.activation_nbytes(width, bounds, kind)), np.uint8)
            kernels.quantize_rows(values, bounds, blocks, threads, kind)
        out = np.empty((rows, height), np.float32)

        def call(matrix: Bytes, x: NDArray[np.generic] = x, out: Floats = out) -> None:
            kernels.matmul(kind, matrix, height, width, bounds, x, out, threads)

        rates.append(2 * height * width * rows / typical(call, matrices, seconds))
    return rates


def _memory(memory: Bytes, threads: int, seconds: float) -> float:
    """Bytes/s that `threads` threads read; 0.0 without the compiled kernels."""
    with suppress(ImportError):
        limits: Any = importlib.import_module("mpillm.kernels._limits")
        pieces = [memory[at : at + PIECE] for at in range(0, memory.nbytes, PIECE)]
        return PIECE / typical(lambda piece: limits.read(piece, threads), pieces, seconds)
    return 0.0


def _context(nbytes: int, tokens: int = CONTEXT) -> int:
    """Up to `tokens` tokens for measuring attention: whole blocks, whose keys and values take at most `nbytes`."""
    token = 2 * SEQUENCES * KV_HEADS * HEAD_DIM * np.dtype(np.uint16).itemsize
    return max(min(tokens, nbytes // token // KV_BLOCK * KV_BLOCK), KV_BLOCK)


def _attention(context: int, threads: int, seconds: float) -> tuple[float, float]:
    """Operations/s of attention: with one row of each of SEQUENCES sequences, and with the rows of a prompt.

    The sequences and the prompt have `context` tokens each.
    """
    per_sequence = context // KV_BLOCK
    blocks = SEQUENCES * per_sequence
    keys = np.zeros((blocks, KV_HEADS, HEAD_DIM, KV_BLOCK), np.uint16)
    values = np.zeros((blocks, KV_HEADS, KV_BLOCK, HEAD_DIM), np.uint16)
    table, of_head = (
        np.arange(blocks, dtype=np.int32),
        np.arange(HEADS, dtype=np.int32) // (HEADS // KV_HEADS),
    )

    def rate(positions: NDArray[np.int32], starts: NDArray[np.int32]) -> float:
        q = np.zeros((len(positions), HEADS * HEAD_DIM), np.float32)
        out = np.empty_like(q)

        def call(_: int) -> None:
            kernels.attention(
                KvType.F16, q, out, keys, values, positions, table, starts, of_head, KV_HEADS, HEAD_DIM,
                HEAD_DIM**-0.5, 0, threads,
            )  # fmt: skip

        return 4 * q.shape[1] * float((positions + 1).sum(dtype=np.int64)) / typical(call, [0], seconds)

    ends = np.full(SEQUENCES, context - 1, np.int32)
    starts = np.arange(SEQUENCES, dtype=np.int32) * per_sequence
    return rate(ends, starts), rate(np.arange(context, dtype=np.int32), np.zeros(context, np.int32))


def _values(threads: int, seconds: float) -> float:
    """Return the average values/s of a norm, an activation function and quantisation."""
    width = NUMPY_WIDTH if kernels.path() == "numpy" else WIDTH
    x, weight = np.ones((VALUE_ROWS, width), np.float32), np.ones(width, np.float32)
    out, bounds = np.empty_like(x), np.array([0, width], np.int32)
    blocks = np.empty((VALUE_ROWS, kernels.activation_nbytes(width, bounds)), np.uint8)

    def call(_: int) -> None:
        kernels.rms_norm(x, weight, 1e-5, out, threads)
        kernels.activate(Activation.SILU, x, out, out, threads)
        kernels.quantize_rows(x, bounds, blocks, threads)

    return 3 * x.size / typical(call, [0], seconds)
