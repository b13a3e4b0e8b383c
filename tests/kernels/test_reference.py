"""What the kernels compute, on every path: against float64, NumPy's twin and the gguf library's own quantiser."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import gguf.quants
import ml_dtypes
import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import Activation, BlockType, KvType, lanes, reference
from mpillm.kernels.blocks import quantise_q8
from mpillm.kernels.scaled_blocks import BLOCKS, NF4
from tests.kernels import cases


@pytest.fixture(autouse=True, params=kernels.available())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.path()
    kernels.set_path(request.param)
    yield request.param
    kernels.set_path(before)


GGUF = {t: gguf.GGMLQuantizationType[t.multiplied_as.name] for t in BlockType if not (t.scaled or t.whole)}


def quantized(type: BlockType, x: cases.Array) -> cases.Array:
    return cases.Case("quantize", [int(type), *x.shape], [x]).run()[0]


def dequantized(type: BlockType, raw: cases.Array, k: int) -> cases.Array:
    return cases.Case("dequantize", [int(type), len(raw), k], [raw]).run()[0]


@pytest.mark.parametrize("type", [BlockType.Q8_0, BlockType.Q4_0])
def test_quantize_as_the_gguf_library(type: BlockType) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 320)).astype(np.float32)
    x[3], x[4, ::3] = 0, 0
    x[5] = np.round(x[5] * 4)  # ties between magnitudes
    x *= np.float32(10) ** rng.integers(-4, 5, (40, 1)).astype(np.float32)
    assert np.array_equal(quantized(type, x), gguf.quants.quantize(x, GGUF[type]))


@pytest.mark.parametrize("type", GGUF)
def test_dequantize_as_the_gguf_library(type: BlockType) -> None:
    rng = np.random.default_rng(2)
    k = cases.whole(type, 96)
    raw = cases.canonical(rng, type, 12, k)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw.view(np.float32) if type == BlockType.F32 else raw, GGUF[type])
    assert cases.same(dequantized(type, raw, k), want.astype(np.float32))


@pytest.mark.parametrize("k", [64, 128, 200, 400])
def test_dequantize_codes_of_floats(k: int) -> None:
    """As ml_dtypes reads e4m3 and e2m1 numbers, without those of NaN, for which blocks have a scale of NaN."""
    rng = np.random.default_rng(k)

    def e4m3(codes: cases.Array) -> cases.Array:
        codes[codes & 127 == 127] = 5
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)

    for type in (type for type in BlockType if type.scaled):
        raw = cases.canonical(rng, type, 12, k)
        blocks = raw.view(BLOCKS[type])
        blocks["d"] = rng.standard_normal(blocks["d"].shape)
        if type is BlockType.FP8:
            values = e4m3(blocks["q"])
        else:
            q = blocks["q"].reshape(*blocks.shape, -1, 1, 16)
            codes = np.concatenate([q & 15, q >> 4], axis=-2).reshape(*blocks.shape, -1)
            values = np.array([bits.view(ml_dtypes.float4_e2m1fn) for bits in codes]).astype(np.float64)
            if type is BlockType.NVFP4:
                values *= np.repeat(e4m3(blocks["scales"]), 16, axis=-1)
            else:
                values = NF4.astype(np.float64)[codes]
        want = (values * blocks["d"][..., None]).reshape(12, -1)[:, :k].astype(np.float32)
        assert np.array_equal(dequantized(type, raw, k), want), type


def test_nf4_is_the_table_of_bitsandbytes() -> None:
    """As `create_normal_map` makes it there: quantiles of a normal distribution, by the largest one."""
    at = statistics.NormalDist().inv_cdf
    above = [at(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-at(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, np.sort([*above, 0.0, *below]) / max(above), atol=1e-6)


def test_q8_0_round_trip() -> None:
    """The wire's promises: 34 bytes for 32 values, and a mean squared error below 1e-4 on unit variance."""
    x = np.random.default_rng(3).standard_normal((64, 4096)).astype(np.float32)
    raw = quantized(BlockType.Q8_0, x)
    assert raw.nbytes / x.nbytes == pytest.approx(1 - 0.734, abs=5e-4)
    assert np.mean((dequantized(BlockType.Q8_0, raw, 4096) - x) ** 2) < 1e-4


@pytest.mark.parametrize("type", [BlockType.Q8_0, BlockType.Q4_0])
def test_quantize_what_is_not_finite_shows(type: BlockType) -> None:
    x = np.ones((4, 64), np.float32)
    x[0, 3], x[1, 40], x[2, 5] = np.nan, np.inf, -np.inf
    back = dequantized(type, quantized(type, x), 64)
    for row, bad in ((0, slice(0, 32)), (1, slice(32, 64)), (2, slice(0, 32))):
        assert np.isnan(back[row, bad]).all()
    assert np.isfinite(back[3]).all()
    assert np.isfinite(back[0, 32:]).all()
    assert np.isfinite(back[1, :32]).all()


@pytest.mark.parametrize("type", list(BlockType))
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (19, 45, 3), (64, 256, 20), (48, 1000, 2)])
def test_products(type: BlockType, n: int, k: int, m: int) -> None:
    """x W^T in float64 on what the blocks mean; float32 chains err by about k ulp at the very most."""
    rng = np.random.default_rng(k)
    k = cases.whole(type, k)
    weights = cases.canonical(rng, type, n, k)
    w = dequantized(type, weights, k).astype(np.float64)
    x = rng.standard_normal((m, k)).astype(np.float32)
    finite = np.isfinite(w).all(axis=1)
    w[~finite] = 0
    bounds = np.array([0, k // 2 // type.block * type.block, k], np.int32)
    got = cases.Case("product", [int(type), n, k, m, 1], [weights, bounds, x]).run()[-1]
    exact = x.astype(np.float64)
    if type.quantised:
        padded = np.zeros((m, -(-k // 32) * 32), np.float32)
        padded[:, :k] = x
        cuts = bounds[1:-1] if type.whole else np.arange(32, padded.shape[1], 32)
        for part in np.split(padded, cuts[cuts > 0], axis=1):
            sizes = np.sort(np.abs(part), axis=-1)  # W8A8: the largest value has more bits
            scale = sizes[:, -1:] / np.float32(127)
            if type.whole:
                scale = np.maximum(sizes[:, -2:-1] / np.float32(127), sizes[:, -1:] / np.float32(127 * 128))
            part[:] = np.rint(part / scale) * scale
        exact = padded[:, :k].astype(np.float64)
        np.testing.assert_allclose(exact, x, atol=0.02)
    if type.multiplied_as == BlockType.BF16:
        exact = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    want = exact @ w.T
    bound = (np.abs(exact) @ np.abs(w.T)) * (2e-3 if type.quantised else k * 6e-8) + 1e-30
    assert (np.abs(got - want)[:, finite] <= bound[:, finite]).all()
    assert not np.isfinite(got[:, ~finite]).any() or type.quantised


def test_agrees_with_the_numpy_twin(path: str) -> None:
    """Integers exactly, floats within 2e-5 of the largest value in a row."""
    for case in cases.everything(np.random.default_rng(23)):
        got = case.run()
        kernels.set_path("numpy")
        want = case.run()
        kernels.set_path(path)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            if a.dtype != np.float32:
                assert np.array_equal(a, b), str(case)
                continue
            with np.errstate(all="ignore"):
                assert np.array_equal(np.isfinite(a), np.isfinite(b)), str(case)
                size = np.abs(np.where(np.isfinite(b), b, 0)).max(axis=-1, keepdims=True)
                close = np.abs(a - b) <= 2e-5 * size + 1e-37
            assert (close | ~np.isfinite(b)).all(), str(case)


def test_exp_within_2_ulp() -> None:
    """Seen through sums of two in which the other vanishes: e^0 + e^x for large x, e^x / (e^0 + e^x) for small."""
    x = np.linspace(-103.9, -20, 60000, dtype=np.float32)
    pairs = np.stack([np.zeros_like(x), x], axis=1)
    up = x[x > -88.7]
    sums = np.empty((len(up), 1, 3), np.float32)
    kernels.lse_parts(pairs[x > -88.7], np.full(len(up), -1, np.float32), np.array([0, 2], np.int32), sums, 1)
    kernels.softmax(pairs, 1)
    for got, exponent in ((pairs[:, 1], x), (sums[:, 0, 2], -up)):
        want = np.exp(exponent.astype(np.float64))
        assert (np.abs(got - want) <= 2 * np.spacing(want.astype(np.float32)).astype(np.float64)).all()


def test_exp_of_the_twin_within_2_ulp() -> None:
    x = np.concatenate([np.linspace(-104, 88.72, 200001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    error = np.abs(lanes.exp(x) - want) / np.spacing(want.astype(np.float32))
    assert error.max() <= 2
    edges = lanes.exp(np.array([np.nan, np.inf, -np.inf, 89, -200, 0], np.float32))
    np.testing.assert_array_equal(edges, np.array([np.nan, np.inf, 0, np.inf, 0, 1], np.float32))


SHAPES = [
    *(
        (*shape, False)
        for shape in ((8, 4, 1, 0), (24, 3, 3, 33), (64, 9, 3, 0), (128, 8, 2, 7), (64, 4, 2, -20))
    ),
    *((*shape, True) for shape in ((8, 4, 4, 0), (64, 3, 3, 0), (64, 6, 2, 40))),
]


@pytest.mark.parametrize(
    ("kv_type", "hd", "heads", "kvh", "window", "bidirectional"),
    [(kind, *shape) for kind in cases.KV_TYPES for shape in SHAPES if not kind.int8 or shape[0] >= 32],
)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention(
    kv_type: KvType, hd: int, heads: int, kvh: int, window: int, bidirectional: bool, softcap: float
) -> None:
    """Softmax attention in float64 over the rows that were stored: half of them with sinks and narrower values."""
    tuning = 0.4 if window < 0 else 0.0
    vd, sinks = (hd, False) if softcap else (max(hd // 2, 8 if hd < 64 else 32), True)
    case = cases.attention(
        np.random.default_rng(hd),
        kv_type,
        hd,
        heads,
        kvh,
        window,
        vd=vd,
        sinks=sinks,
        softcap=softcap,
        tuning=tuning,
        bidirectional=bidirectional,
    )
    _, _, got = case.run()
    k, v, block, offset, q, pos, table, table_start, kv_of_head, scale, sink = case.arrays
    place = {(b, o): i for i, (b, o) in enumerate(zip(block.tolist(), offset.tolist(), strict=True))}
    if kv_type == KvType.F16:
        k, v = k.astype(np.float16), v.astype(np.float16)
    elif kv_type.int8:
        k, v = (rounded(x) for x in (k, v))
    if kv_type == KvType.Q8_0_INT8:  # the scales of the queries stay float32
        scales, integers = quantise_q8(q.reshape(-1, 32))
        q = (scales[:, None].astype(np.float64) * integers).reshape(q.shape)
    for row, at in enumerate(pos.tolist()):
        first, last = (max(0, at - window + 1) if window > 0 else 0), at
        if window < 0:
            first = at // -window * -window
        if bidirectional:
            last = max(
                p for p, start in zip(pos.tolist(), table_start, strict=True) if start == table_start[row]
            )
            last = min(last, at + window - 1) if window else last
        rows = [place[int(table[table_start[row] + t // 32]), t % 32] for t in range(first, last + 1)]
        for head, g in enumerate(kv_of_head.tolist()):
            s = k[rows, g * hd : (g + 1) * hd].astype(np.float64) @ q[row, head * hd : (head + 1) * hd]
            s *= float(scale[0]) * (1 + tuning * np.log1p((at + 1) // 7))
            if softcap:
                s = softcap * np.tanh(s / softcap)
            p, total = np.exp(s), np.exp(s).sum() + (np.exp(float(sink[head])) if sinks else 0)
            want = p / total @ v[rows, g * vd : (g + 1) * vd].astype(np.float64)
            np.testing.assert_allclose(got[row, head * vd : (head + 1) * vd], want, atol=1e-5)


def rounded(x: cases.Array) -> cases.Array:
    """What is left of whole blocks of 32 values in Q8_0."""
    n, k = x.shape
    canonical = cases.Case("quantize", [BlockType.Q8_0, n, k], [x]).run()[0]
    return cases.Case("dequantize", [BlockType.Q8_0, n, k], [canonical]).run()[0]


def test_small_operations_mean_what_they_say() -> None:
    rng = np.random.default_rng(9)
    x, w = rng.standard_normal((5, 77)).astype(np.float32), rng.standard_normal(77).astype(np.float32)
    d = x.astype(np.float64)
    eps = np.array([1e-6], np.float32)
    for groups in (1, 7):
        norm = cases.Case("rms_norm", [5, 77, groups], [x, w, eps]).run()[0]
        np.testing.assert_allclose(norm, w * d / np.sqrt((d**2).mean(1, keepdims=True) + 1e-6), rtol=1e-6)
    shifted = d + 5
    norm = cases.Case("layer_norm", [5, 77], [shifted.astype(np.float32), w, x[0], eps]).run()[0]
    centred = shifted - shifted.mean(1, keepdims=True)
    want = w * centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) + x[0]
    np.testing.assert_allclose(norm, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cases.Case("square_sums", [5, 77], [x]).run()[0], (d**2).sum(1), rtol=1e-6)
    np.testing.assert_allclose(
        cases.Case("softcap", [5, 77], [x, np.array([0.7], np.float32)]).run()[0],
        0.7 * np.tanh(d / 0.7),
        rtol=1e-6,
    )
    e = np.exp(d)
    np.testing.assert_allclose(
        cases.Case("softmax", [5, 77], [x]).run()[0], e / e.sum(1, keepdims=True), rtol=1e-6
    )
    inv_t, cuts = np.array([0, 0.5, 1, 2, 3], np.float32), np.array([0, 0, 30, 77], np.int32)
    parts = cases.Case("lse_parts", [5, 77, 3], [x, inv_t, cuts]).run()[0]
    assert np.isneginf(parts[:, 0, 0]).all()
    assert (parts[:, 0, 1:] == 0).all()
    for p, part in ((1, d[:, :30]), (2, d[:, 30:])):
        top = part.max(1, keepdims=True)
        want = [top[:, 0], np.exp(part - top).sum(1), np.exp((part - top) * inv_t[:, None]).sum(1)]
        np.testing.assert_allclose(parts[:, p], np.stack(want, 1), rtol=1e-6)
    cos, sin = rng.standard_normal((2, 5, 7)).astype(np.float32)
    rows = x[:, :70].copy()
    c, s = cos[:, None], sin[:, None]
    turned = cases.Case("rope", [5, 5, 14, 14, 0], [rows, cos, sin]).run()[0].reshape(5, 5, 14)
    a, b = rows.reshape(5, 5, 14)[..., :7], rows.reshape(5, 5, 14)[..., 7:]
    assert np.array_equal(turned, np.concatenate([a * c - b * s, b * c + a * s], -1))
    turned = cases.Case("rope", [5, 5, 14, 14, 1], [rows, cos, sin]).run()[0].reshape(5, 5, 14)
    a, b = rows.reshape(5, 5, 14)[..., ::2], rows.reshape(5, 5, 14)[..., 1::2]
    assert np.array_equal(turned, np.stack([a * c - b * s, b * c + a * s], -1).reshape(5, 5, 14))
    few = cases.Case("rope", [5, 5, 14, 6, 1], [rows, cos[:, :3].copy(), sin[:, :3].copy()]).run()[0]
    assert np.array_equal(few.reshape(5, 5, 14)[..., 6:], rows.reshape(5, 5, 14)[..., 6:])
    assert np.array_equal(few.reshape(5, 5, 14)[..., :6], turned[..., :6])


def activated(kind: Activation, x: cases.Array) -> cases.Array:
    """The function in float64, as its paper writes it; of the clamped SwiGLU the gate's part."""
    match kind:
        case Activation.SILU:
            return x / (1 + np.exp(-x))
        case Activation.GELU:
            return np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)
        case Activation.GELU_TANH:
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case Activation.RELU:
            return np.where(x > 0, x, 0)
        case Activation.RELU2:
            return np.where(x > 0, x, 0) ** 2
        case Activation.SIGMOID:
            return 1 / (1 + np.exp(-x))
        case Activation.SWIGLU_CLAMPED:
            gate = np.minimum(x, 2)
            return gate / (1 + np.exp(-1.702 * gate))
        case Activation.IDENTITY:
            return x
        case Activation.SILU_SCALED:
            return 1.702 * x / (1 + np.exp(-1.702 * x))


@pytest.mark.parametrize("kind", list(Activation))
def test_activations(kind: Activation) -> None:
    rng = np.random.default_rng(7)
    gate, up = (
        (4 * rng.standard_normal((9, 77))).astype(np.float32),
        rng.standard_normal((9, 77)).astype(np.float32),
    )
    parameters = np.array([2, 1.702], np.float32)
    want, factor = activated(kind, gate.astype(np.float64)), up.astype(np.float64)
    if kind == Activation.SWIGLU_CLAMPED:
        gated, up = factor * 3, up * 3
        got = cases.Case("activate", [9, 77, int(kind)], [gate, up, parameters]).run()[0]
        np.testing.assert_allclose(got, want * (np.clip(gated, -2, 2) + 1), rtol=2e-6, atol=1e-6)
        return
    alone = cases.Case(
        "activate", [9, 77, int(kind)], [gate, np.empty((0, 77), np.float32), parameters]
    ).run()[0]
    np.testing.assert_allclose(alone, want, rtol=2e-6, atol=2e-7)
    got = cases.Case("activate", [9, 77, int(kind)], [gate, up, parameters]).run()[0]
    assert cases.same(got, alone * up)


def test_tanh_and_erfc_of_the_twin() -> None:
    x = np.concatenate([np.linspace(-20, 20, 200001), np.linspace(-1, 1, 100001), [0.0, 1e-30]]).astype(
        np.float32
    )
    want = np.tanh(x.astype(np.float64))
    assert (np.abs(lanes.tanh(x) - want) <= 2 * np.spacing(np.abs(want).astype(np.float32))).all()
    edges = lanes.tanh(np.array([np.nan, np.inf, -np.inf, -0.0], np.float32))
    np.testing.assert_array_equal(edges, np.array([np.nan, 1, -1, -0.0], np.float32))
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    want = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
    np.testing.assert_allclose(lanes.normal(x), want, rtol=2e-5)
    np.testing.assert_allclose(lanes.normal(x), want, atol=2e-7)


def test_a_whole_norm_over_shards_is_that_of_one() -> None:
    """Each shard has some heads: their sums of squares, added in order, give the bits of the norm of all."""
    rng = np.random.default_rng(10)
    x, w = rng.standard_normal((4, 6 * 24)).astype(np.float32), rng.standard_normal(6 * 24).astype(np.float32)
    whole = cases.Case("rms_norm", [4, 144, 6], [x, w, np.array([1e-5], np.float32)]).run()[0]
    sums = np.empty((4, 6), np.float32)
    for first in (0, 2):
        mine, heads = np.ascontiguousarray(x[:, 24 * first :]), 6 - first
        part = cases.Case("square_sums", [4 * heads, 24], [mine.reshape(-1, 24)]).run()[0]
        sums[:, first:] = part.reshape(4, heads)
    total = sums[:, 0].copy()
    for head in range(1, 6):
        total += sums[:, head]
    scale = np.float32(1) / np.sqrt(total / np.float32(144) + np.float32(1e-5))
    assert cases.same(w * (x * scale[:, None]), whole)


def test_top_k_order() -> None:
    x = np.array([[1, 3, 3, -np.inf, np.nan, 2, 3]], np.float32)
    got, ids = cases.Case("top_k", [1, 7, 9], [x]).run()
    assert ids.tolist() == [[1, 2, 6, 5, 0, 3, 4, -1, -1]]
    assert got.tolist() == [[3, 3, 3, 2, 1, -np.inf, -np.inf, -np.inf, -np.inf]]
    wide = np.random.default_rng(4).standard_normal((2, 5000)).astype(np.float32)
    assert np.array_equal(
        cases.Case("top_k", [2, 5000, 64], [wide]).run()[1], np.argsort(-wide, 1, kind="stable")[:, :64]
    )


def test_rows_may_be_strided() -> None:
    """Views of wider matrices work where the interface says so, and nothing beside them is touched."""
    rng = np.random.default_rng(6)
    wide = rng.standard_normal((3, 200)).astype(np.float32)
    x, out = wide[:, 10:74], np.full((3, 100), 7, np.float32)
    w = np.ones(64, np.float32)
    plain = np.empty((3, 64), np.float32)
    kernels.rms_norm(x.copy(), w, 1e-5, plain, 1)
    kernels.rms_norm(x, w, 1e-5, out[:, 20:84], 1)
    assert np.array_equal(out[:, 20:84], plain)
    kernels.activate(Activation.SILU, x.copy(), x.copy(), plain, 1)
    kernels.activate(Activation.SILU, x, x, out[:, 20:84], 1)
    assert np.array_equal(out[:, 20:84], plain)
    weights = cases.canonical(rng, BlockType.BF16, 33, 64)
    bounds = np.array([0, 64], np.int32)
    packed = np.empty(kernels.packed_nbytes(BlockType.BF16, 33, 64, bounds), np.uint8)
    kernels.pack(BlockType.BF16, weights, 64, bounds, packed, 1)
    product, beside = np.empty((3, 33), np.float32), np.full((3, 100), 7, np.float32)
    kernels.matmul(BlockType.BF16, packed, 33, 64, bounds, x.copy(), product, 1)
    kernels.matmul(BlockType.BF16, packed, 33, 64, bounds, x, beside[:, 8:41], 2)
    assert cases.same(beside[:, 8:41].copy(), product)
    assert (out[:, :20] == 7).all()
    assert (out[:, 84:] == 7).all()
    assert (beside[:, :8] == 7).all()
    assert (beside[:, 41:] == 7).all()


def test_both_say_the_same_sizes() -> None:
    assert reference.packed_nbytes(BlockType.Q4_0, 17, 70, [0, 64, 70]) == 32 * 3 * 18
    assert reference.packed_nbytes(BlockType.BF16, 17, 70, [0, 7, 70]) == 17 * 70 * 2
    assert reference.activation_nbytes(70, [0, 7, 70]) == 56 * 3
