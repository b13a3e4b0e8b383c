"""The bench: synthetic models of every type run, what is measured has the form it is said to have, ratios are ratios.

Nothing here looks at the clock: times are whatever they are.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mpillm import kernels
from mpillm.bench import against, disk, machine, packed, runs, synthetic, synthetic_shapes, tables
from mpillm.bench import kernels as kernel_bench
from mpillm.bench.paging import TURN, WARM, all_decode
from mpillm.bench.profile import Profile
from mpillm.bench.result import Bench, Machine, Run
from mpillm.bench.runs import BenchOptions, TimedStep, _typical
from mpillm.comm.program import guard
from mpillm.comm.world import World
from mpillm.errors import JobError
from mpillm.kernels import BlockType
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.run.session import Session
from mpillm.weights.io.reading import Bytes, read_direct
from mpillm.weights.source import check_tensors, rank_plans
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.job_helpers import CHAT

PEER = pytest.mark.skipif(not against.installed(), reason="no llama-cpp-python: pip install 'mpillm[bench]'")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models."""
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bench(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_bounded(
        [sys.executable, "-m", "mpillm", "bench", *arguments], env=clean_environment(MPILLM_CACHE=str(cache))
    )


@pytest.mark.parametrize("weights", synthetic_shapes.WEIGHTS | synthetic_shapes.MIXTURES)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-moe"])
def test_a_synthetic_model_is_a_whole_model(cache: Path, shape: str, weights: str) -> None:
    path = synthetic.create(shape, weights)
    assert path.parent == cache / "synthetic"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with closing(open_source(path)) as source:
        config = config_of(source)
        check_tensors(source, config)
        sizes = synthetic_shapes.SHAPES[shape]
        assert (config.hidden, config.n_layers, config.vocab) == (sizes.hidden, sizes.layers, sizes.vocab)
        assert config.layers[0].mlp.count == sizes.experts
        for key in source.tensors:
            values = source.read_f32(key)
            assert np.isfinite(values).all(), key
            if values.ndim == 2:
                assert 0.2 < values.std() * values.shape[1] ** 0.5 < 5, key
                assert len(np.unique(values, axis=0)) == len(values), key


def test_a_synthetic_model_is_made_once(cache: Path) -> None:
    path = synthetic.create("tiny-llama", "q4_0")
    before = path.stat()
    assert synthetic.create("tiny-llama", "q4_0") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    content = path.read_bytes()
    path.unlink()
    assert synthetic.create("tiny-llama", "q4_0").read_bytes() == content


def test_sizes_are_those_of_the_models_they_are_named_after() -> None:
    def gib(shape: str, weights: str) -> float:
        sizes = synthetic_shapes.tensors(synthetic_shapes.SHAPES[shape], weights)
        return sum(synthetic_shapes.nbytes(stored, dims) for _, dims, stored in sizes) / 2**30

    assert gib("llama-1b", "q4_0") == pytest.approx(609 / 1024, rel=0.001)
    assert gib("llama-8b", "q4_0") == pytest.approx(4.33, rel=0.01)  # Meta-Llama-3-8B.Q4_0.gguf
    assert gib("llama-8b", "q4_k_m") == pytest.approx(4.58, rel=0.01)  # Meta-Llama-3-8B.Q4_K_M.gguf
    assert gib("llama-70b", "q4_0") == pytest.approx(37.2, rel=0.01)
    assert gib("qwen3-30b-a3b", "q8_0") == pytest.approx(30.25, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "weights"), [("tiny-llama", "q4_0"), ("tiny-moe", "q4_0"), ("tiny-llama", "w8a8")]
)
def test_a_synthetic_model_in_packed_form_is_a_whole_model(cache: Path, shape: str, weights: str) -> None:
    """Every layer is there, with bytes of its own on the disk; the hashes are right, so packing would keep them."""
    path = packed.create(shape, weights, 1)
    assert [file.name for file in (cache / "synthetic").iterdir()] == [path.name]
    assert packed.create(shape, weights, 1) == path
    sizes = synthetic_shapes.SHAPES[shape]
    with closing(open_source(path)) as source:
        config = config_of(source)
        check_tensors(source, config)
        assert (config.n_layers, config.layers[0].mlp.count) == (sizes.layers, sizes.experts)
        queries = {info.type.name for key, info in source.tensors.items() if key.role == "q"}
        assert queries == {weights.upper()}
    index = json.loads((path / "packed.json").read_text())
    layers = 0
    for entry in index["files"]:
        raw = (path / entry["name"]).read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        assert (len(raw), hashlib.sha256(raw[begin:]).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert (path / entry["name"]).stat().st_blocks * 512 >= len(raw)
        layers += entry["name"].startswith("layer-")
    assert layers == sizes.layers


def test_paging_says_what_was_read(cache: Path) -> None:
    """Bytes, not times: what a step reads is what the budget leaves out, and a percentage is one of the share."""
    file = cache.parent / "bench.json"
    done = bench(
        cache, "--synthetic", "tiny-llama", "--what", "paging", "--budget", "60%,480KiB", "--sequences", "1,3",
        "--repeats", "3", "--threads", "1", "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = msgspec.json.decode(file.read_bytes(), type=Bench, strict=True)
    with closing(open_source(Path(made.model))) as source:
        config = config_of(source)
        share = sum(item.nbytes for item in rank_plans(config, Place(0, 1, 1), source))
    assert [(run.what, run.sequences) for run in made.runs] == [("paging", 1), ("paging", 3)] * 2
    for run, budget in zip(made.runs, [int(0.6 * share)] * 2 + [480 * 1024] * 2, strict=True):
        assert run.budget == budget
        # Which pages are under way when the counting begins and ends is chance.
        assert 0.9 * (share - budget) <= run.streamed <= 1.1 * share
        assert min(run.rate, run.ready, run.first_step, run.memory) > 0
        assert (run.disk is None) == (run.disk_share is None)
    assert made.model_bytes > share
    head, *rows = (line for line in done.stdout.splitlines() if line.startswith(("paging", "decode x")))
    assert "of the limit" in head
    assert len(rows) == 4
    sizes = ["--budget", "60%", "--sequences", "1", "--repeats", "1", "--threads", "1", "--json", str(file)]
    done = bench(cache, "--synthetic", "tiny-moe", "--what", "paging", *sizes)
    assert done.returncode == 0, done.stderr
    (run,) = msgspec.json.decode(file.read_bytes(), type=Bench, strict=True).runs
    if run.disk is not None:  # a mixture's limit is what its tokens needed
        assert run.disk_share == pytest.approx(run.streamed / run.disk / run.seconds)


def test_paging_counts_steps_in_which_all_generate() -> None:
    """Neither prompts, nor the first steps after them or after the disk was measured, nor when some have ended."""
    rng = np.random.default_rng()
    prompts = [TimedStep(10, 2, 9.0), TimedStep(0, 2, 9.0), TimedStep(6, 4, 9.0)]
    warm, end = [TimedStep(0, 4, 8.0)] * (WARM + 1), [TimedStep(0, 2, 7.0)]
    # More than a turn has besides its first.
    counted = [TimedStep(0, 4, seconds) for seconds in rng.random(TURN)]
    run = [*prompts, *warm, *counted[:-1], TimedStep(0, 4, 6.0), counted[-1], TimedStep(0, 4, 5.0), *end]
    assert all_decode(run, 4, len(counted)) == counted
    assert all_decode(run, 4, 1) == counted[:1]
    halves = [TimedStep(0, 2, seconds) for seconds in rng.random(4)]  # two micro-batches
    assert all_decode(prompts + [TimedStep(0, 2, 8.0)] * 2 * (WARM + 1) + halves + end, 4, 2) == halves


def test_speculation_says_what_drafts_gave(cache: Path) -> None:
    """The model drafts for itself: nearly all is right, and `bench` itself checks that answers are the same."""
    file = cache.parent / "bench.json"
    sizes = ["--context", "5", "--threads", "1", "--repeats", "1", "--draft", str(CHAT), "--json", str(file)]
    sizes += ["--budget", "75%"]  # the draft model is there beside a budget, too
    done = bench(cache, "--model", str(CHAT), "--what", "speculation", "--prompt", "40", *sizes)
    assert done.returncode == 0, done.stderr
    made = msgspec.json.decode(file.read_bytes(), type=Bench, strict=True)
    names = ["summary", "code edit", "extraction"]
    assert [(run.text, run.drafts) for run in made.runs] == [
        (name, mode) for name in names for mode in ("off", "prompt-lookup", "auto")
    ]
    for run in made.runs:
        assert run.seconds > 0
        assert run.gain is not None
        if run.drafts == "off":
            assert (run.per_pass, run.drafters, run.gain) == (1.0, {}, 1.0)
        for drafts in run.drafters.values():
            assert 0 <= drafts.accepted <= drafts.drafted
    assert any(run.per_pass > 1 for run in made.runs)
    assert any("model" in run.drafters for run in made.runs)
    assert "tokens a pass" in done.stdout
    done = bench(
        cache, "--synthetic", "tiny-llama", "--what", "speculation", "--prompt", "40", "--threads", "1"
    )
    assert done.returncode == 2, done.stderr
    assert "has no tokenizer, which the measurement of speculation needs" in done.stderr


def test_the_disk_is_read_on_and_on(tmp_path: Path) -> None:
    """Each measurement goes on where the last one ended, over all files and round again, and reads what it says."""
    sizes, requests = [3, 2], list[tuple[int, int]]()
    paths = [tmp_path / str(size) for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        with path.open("wb") as file:
            file.truncate(size * disk.REQUEST_BYTES + 4096)

    def read(descriptor: int, offset: int, out: Bytes) -> bool:
        assert out.nbytes == disk.REQUEST_BYTES
        requests.append((descriptor, offset))
        return read_direct(descriptor, offset, out)

    with pytest.MonkeyPatch.context() as patch, closing(disk.DiskReader(paths)) as measured:
        patch.setattr(disk, "read_direct", read)
        patch.setattr(disk, "READERS", (1,))
        patch.setattr(disk, "MAX_BYTES", 3 * disk.REQUEST_BYTES)
        for _ in range(4):
            measured.measure()
    if not measured.rates:
        pytest.skip("files cannot be read past the page cache here")
    assert len(measured.rates) == 4
    assert min(measured.rates) > 0
    assert len(requests) == 12
    assert len(set(requests)) == 5
    assert requests == [requests[number % 5] for number in range(12)]


def test_a_budget_that_is_none_is_refused(cache: Path) -> None:
    done = bench(cache, "--what", "paging", "--budget", "much")
    assert done.returncode == 2, done.stderr
    assert "'much' is neither a percentage nor a size such as 4GiB" in done.stderr
    done = bench(cache, "--synthetic", "tiny-llama", "--what", "paging", "--budget", "1%", "--threads", "1")
    assert done.returncode == 2, done.stderr
    assert "--budget 1% is" in done.stderr
    assert "the minimum is" in done.stderr


def test_no_room_for_a_synthetic_model_is_said_before_it_is_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = synthetic.shutil.disk_usage
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: usage(path)._replace(free=10_000))
    with pytest.raises(JobError, match=r"takes \S+ MiB, but 9\.8 KiB are free"):
        synthetic.create("tiny-llama", "q4_0")
    assert not list((cache / "synthetic").iterdir())


@pytest.mark.parametrize(("shape", "weights"), [("llama-2b", "q4_0"), ("tiny-llama", "q1_k")])
def test_what_cannot_be_made_is_refused(cache: Path, shape: str, weights: str) -> None:
    with pytest.raises(JobError, match=r"There is no synthetic model .* llama-1b, .* weights q4_0,"):
        synthetic.create(shape, weights)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, str]:
    """A small bench of everything, from the command line."""
    cache = tmp_path_factory.mktemp("cache")
    file = cache / "bench.json"
    sizes = ["--sequences", "1,3", "--prompt", "40", "--context", "5", "--threads", "1", "--repeats", "1"]
    done = bench(cache, "--synthetic", "tiny-moe", "--weights", "q8_0", *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(file.read_bytes(), type=Bench, strict=True), done.stdout


def test_the_json_holds_every_run(measured: tuple[Bench, str]) -> None:
    made, _ = measured
    assert [(run.what, run.sequences, run.tokens, run.threads) for run in made.runs] == [
        ("startup", 1, 16, 1),
        ("prefill", 1, 40, 1),
        ("decode", 1, 5, 1),
        ("batch", 3, 5, 1),
    ]
    assert all(run.seconds > 0 and run.ratio is None for run in made.runs)
    for run in made.runs[1:]:
        assert run.rate > 0
        assert run.kernels["compute"] > 0
        assert run.overhead == pytest.approx(1 - sum(run.kernels.values()))
        assert run.wire_bytes == 0
    assert made.model_bytes == Path(made.model).stat().st_size
    assert (made.ranks, made.stages, made.shards, made.peer) == (1, 1, 1, None)


def test_a_batch_reads_more_experts_than_one_sequence(measured: tuple[Bench, str]) -> None:
    made, _ = measured
    one, three = made.runs[2:]
    sizes = synthetic_shapes.SHAPES["tiny-moe"]
    expert = 3 * sizes.ffn * sizes.hidden * 34 // 32
    picked = [sizes.experts * (1 - 0.75**rows) for rows in (1, 3)]
    assert three.weight_bytes - one.weight_bytes == pytest.approx(
        sizes.layers * expert * (picked[1] - picked[0]), abs=1
    )
    assert 0 < one.kv_bytes * 3 == three.kv_bytes
    # Of a prompt only the last token has logits.
    prompt, head = made.runs[1], 2 * sizes.vocab * sizes.hidden
    assert 0 < one.int8_operations * 3 == three.int8_operations
    assert prompt.int8_operations == 40 * (one.int8_operations - head) + head
    if machine_has_limits():
        for run in made.runs[1:]:
            limit = made.machine.int8[1]
            assert run.int8_share == pytest.approx(run.int8_operations / run.seconds / limit)


def test_kernels_are_measured_beside_the_limits(measured: tuple[Bench, str]) -> None:
    made, _ = measured
    products = [kernel for kernel in made.kernels if kernel.name == "matmul"]
    assert {kernel.detail.split()[0] for kernel in products} == {kind.name for kind in BlockType}
    assert {kernel.rows for kernel in products} == {1, 32, 512}
    small = {kernel.name for kernel in made.kernels if kernel.over_scalar is not None}
    assert small >= {"rms_norm", "rope", "activate", "softmax", "attention", "quantize_rows", "top_k"}
    if machine_has_limits():
        assert all(kernel.read_share == kernel.rate / made.machine.read[1] for kernel in made.kernels)
        quantised = [kernel for kernel in products if kernel.detail.startswith("Q")]
        assert all(kernel.int8_share is not None for kernel in quantised)


def test_the_table_has_a_line_for_everything(measured: tuple[Bench, str]) -> None:
    made, text = measured
    assert tables.as_text(made) == text.rstrip("\n")
    for word in (
        "start to first token",
        "prefill of 40",
        "decode x 1 after 5",
        "decode x 3 after 5",
        "rms_norm",
    ):
        assert word in text
    assert json.loads(tables.as_json(made))["runs"][0]["what"] == "startup"


def machine_has_limits() -> bool:
    made = machine.measure([1], nbytes=2**20, rounds=1000)
    assert made.cpu
    assert (made.read == {}) == (made.int8 == {}) or made.read[1] > 0
    return bool(made.read and made.int8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--what", "decoding"], "'decoding' is not one of kernels, prefill, decode, batch, startup"),
        (["--threads", "0"], "'0' is not a positive number"),
        (["--sequences", "1,x"], "'x' is not a positive number"),
        (["--synthetic", "llama-2b"], "There is no synthetic model llama-2b"),
        (["--synthetic", "tiny-llama", "--against", "vllm"], "cannot run against vllm; give llama.cpp"),
        (["--synthetic", "tiny-llama", "--against", "ik=/x"], "leave startup out of --what"),
        (
            ["--what", "speculation", "--against", "llama.cpp"],
            "--against is for --what batch or decode or prefill",
        ),
        (["--what", "decode", "--budget", "25%"], "--budget is for --what paging or speculation"),
        (["--what", "paging", "--draft", "x"], "--draft is for --what speculation; leave it out"),
        (["--weights", "q8_0"], "--weights is only for --synthetic; leave it out."),
        (
            [
                "--synthetic",
                "tiny-llama",
                "--what",
                "prefill",
                "--threads",
                "1",
                "--against",
                "ik=/nowhere/x",
            ],
            "--against ik=/nowhere/x: this is not a program",
        ),
        (
            ["--synthetic", "tiny-llama", "--what", "decode", "--context", "32760"],
            "takes 32768 tokens, but sequences of 32776",
        ),
        (
            ["--synthetic", "tiny-llama", "--what", "decode", "--json", "/nowhere/x"],
            "/nowhere/x cannot be written",
        ),
    ],
)
def test_a_wrong_command_is_refused(cache: Path, arguments: list[str], reason: str) -> None:
    done = bench(cache, "--repeats", "1", *arguments)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr


def test_two_ranks_measure_together(openmpi: Mpi, cache: Path) -> None:
    file = cache.parent / "bench.json"
    arguments = ["--synthetic", "tiny-llama", "--sequences", "1,2", "--threads", "1", "--repeats", "1"]
    what = ["--what", "startup,prefill,decode,batch", "--prompt", "40", "--json", str(file)]
    done = openmpi.run(2, "-m", "mpillm", "bench", *arguments, *what, env={"MPILLM_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    made = msgspec.json.decode(file.read_bytes(), type=Bench)
    assert (made.ranks, made.stages * made.shards, len(made.runs)) == (2, 2, 4)
    assert all(run.wire_bytes > 0 for run in made.runs[1:])
    assert done.stdout == tables.as_text(made) + "\n"


def test_a_ratio_is_the_median_of_neighbours() -> None:
    # The machine was half as fast in the second turn, and only we were disturbed in the third.
    assert against.ratio([20.0, 10.0, 3.0], [10.0, 5.0, 10.0]) == 2.0


def test_a_typical_step_is_one_that_all_take_part_in() -> None:
    decode = Run(what="batch", threads=1, sequences=4, tokens=1)
    steps = [
        TimedStep(8, 2, 9.0),
        TimedStep(0, 4, 1.0),
        TimedStep(0, 4, 3.0),
        TimedStep(0, 4, 2.0),
        TimedStep(0, 2, 0.1),
    ]
    assert _typical(steps, decode) == TimedStep(0, 4, 2.0)
    prefill = Run(what="prefill", threads=1, sequences=1, tokens=8)
    assert _typical([TimedStep(6, 0, 2.0), TimedStep(2, 1, 1.0)], prefill) == TimedStep(8, 0, 3.0)
    assert _typical([], prefill) is None


def test_a_profile_times_the_kernels_and_leaves_them_as_they_were() -> None:
    before = kernels.softmax
    rows = np.ones((2, 8), np.float32)
    with Profile() as profile:
        for prompt in (True, False, False):
            kernels.softmax(rows, 1)
            profile.step(prompt)
    assert kernels.softmax is before
    assert [name for name, seconds in profile.typical(True) if seconds > 0] == ["softmax"]
    assert [name for name, seconds in profile.typical(False) if seconds > 0] == ["softmax"]
    assert not profile.typical(True)[1:]


def test_the_scalar_path_is_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "ENOUGH", 0.0)
    path = kernels.path()
    sizes = kernel_bench.KernelSizes(
        hidden=64, ffn=64, heads=2, kv_heads=1, head_dim=32, vocab=64, context=32
    )
    nothing = Machine(cpu="", cores=1, kernels=path, read={}, int8={})
    found = list(kernel_bench.measure(sizes, [BlockType.Q4_0], [1], nothing, repeats=1, rows=(1,)))
    assert kernels.path() == path
    assert all(kernel.read_share is None and kernel.int8_share is None for kernel in found)
    assert {kernel.name for kernel in found if kernel.over_scalar} == {k.name for k in found} - {"matmul"}


class StandIn(against.Peer):
    """A peer with times of its own choice, which remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def run(self, prompts: against.Prompts, tokens: int) -> list[float]:
        self.asked.append((len(prompts), len(prompts[0]), tokens))
        return [4.0] + [2.0] * (tokens - 1)

    def start(self, prompt: Sequence[int]) -> float:
        self.asked.append((1, len(prompt), 0))
        return 3.0

    def close(self) -> None:
        pass


def test_runs_against_a_stand_in(cache: Path) -> None:
    # MPI starts once in a process, and pytest's is not the place.
    done = run_bounded([sys.executable, __file__], env=clean_environment(MPILLM_CACHE=str(cache)))
    assert done.returncode == 0, done.stderr
    made, asked = json.loads(done.stdout)
    start, prefill, batch = (msgspec.convert(run, Run) for run in made)
    assert start.peer_seconds == 3.0
    assert start.ratio == pytest.approx(3.0 / start.seconds)
    assert prefill.peer_rate == 40 / 4.0
    assert prefill.ratio == pytest.approx(prefill.rate / 10.0)
    assert batch.peer_rate == 2 / 2.0
    assert batch.ratio == pytest.approx(batch.rate)
    turns = [(1, 16, 0)] * 2, [(1, 40, 1)] * 2, [(2, 7, 16)] * 2  # the first of each warms up
    assert asked == [list(turn) for kind in turns for turn in kind]


def run_against_stand_in(world: World) -> int:
    """Print what three kinds of runs came to, and what the stand-in was asked."""
    peer = StandIn()
    path = synthetic.create("tiny-llama", "q4_0")
    options = BenchOptions(frozenset(), sequences=(2,), prompts=(40,), contexts=(7,), repeats=1)
    job = runs.spec_for(str(path), 1, options)
    start = runs.start_up(world, job, path, options, peer)
    with closing(Session(world, job, path)) as session:
        made = [start, runs.prefill(session, 40, options, peer), runs.decode(session, 2, 7, options, peer)]
    print(json.dumps([msgspec.to_builtins(made), peer.asked]))
    return 0


@PEER
def test_llama_cpp_runs_beside_us(cache: Path) -> None:
    file = cache.parent / "bench.json"
    what = [
        "--what",
        "startup,prefill,decode,batch",
        "--sequences",
        "1,2",
        "--prompt",
        "20",
        "--context",
        "3",
    ]
    done = bench(
        cache, "--synthetic", "tiny-llama", "--weights", "bf16", *what, "--threads", "1", "--repeats", "1",
        "--against", "llama.cpp", "--json", str(file),
    )  # fmt: skip
    if "llama.cpp failed: it ended with exit code -" in done.stderr:
        pytest.skip("this build of llama.cpp crashes on this machine")
    assert done.returncode == 0, done.stderr
    made = msgspec.json.decode(file.read_bytes(), type=Bench)
    assert made.peer is not None
    assert made.peer.startswith("llama.cpp of llama-cpp-python ")
    assert len(made.runs) == 4
    assert all(run.ratio is not None and run.ratio > 0 for run in made.runs)


def test_without_llama_cpp_the_remedy_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "installed", lambda: False)
    with pytest.raises(JobError, match=r"pip install 'mpillm\[bench\]'"):
        against.LlamaCpp(Path("x.gguf"), 1, [0])


@pytest.mark.parametrize("code", ["raise SystemExit(3)", 'print(\'{"error": "no such file"}\', flush=True)'])
def test_a_peer_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, code: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(against, "installed", lambda: True)
    monkeypatch.setattr(against.sys, "executable", str(fake))
    with pytest.raises(JobError, match=r"llama.cpp failed: (it ended with exit code 3|no such file)\."):
        against.LlamaCpp(Path("x.gguf"), 1, [0])


if __name__ == "__main__":
    sys.exit(guard(run_against_stand_in))
