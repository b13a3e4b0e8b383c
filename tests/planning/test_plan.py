"""Plans: their sums against what the loader, the KV cache and the messages really take."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from mpillm import spec
from mpillm.errors import JobError, LayoutError, ModelError
from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.planning import hosts, input_memory, input_needs, job_time, plan, plan_text
from mpillm.planning.hosts import Host
from mpillm.planning.plan import Plan
from mpillm.planning.speed import ASSUMED
from mpillm.planning.token_count import SPECIAL
from mpillm.spec import shown_bytes
from mpillm.weights.paging.weights import streamed_page
from mpillm.weights.roles import Key
from mpillm.weights.source import rank_plans
from tests.model.golden import gguf_path

MODELS = Path(__file__).parent.parent / "fixtures/models"


def planned(model: str, ranks: int, *overrides: str) -> Plan:
    return plan.make(spec.load(None, overrides, model=str(MODELS / model), input="in", output="out"), ranks)


@pytest.mark.parametrize("model", ["llama3", "qwen3_moe_step", "smol_bf16"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 2), (2, 1), (3, 3)])
def test_shares_are_what_is_loaded(model: str, ranks: int, stages: int) -> None:
    made = planned(model, ranks, f"layout.stages={stages}", "memory.kv=4MiB")
    assert (made.stages, made.shards, made.problems) == (stages, ranks // stages, [])
    source = open_source(MODELS / model, "none")
    config = config_of(source)
    held = set[Key]()
    for rank in made.ranks:
        pages = rank_plans(config, Place(rank.rank, stages, ranks // stages), source)
        assert rank.weights_share == rank.weights_held == sum(page.nbytes for page in pages)
        assert rank.weights_streamed == 0
        held.update(entry.key for page in pages for entry in page.entries)
        assert 0 < rank.kv_held <= 4 * 2**20
        assert rank.held == rank.weights_held + rank.kv_held + rank.activations + rank.process
    assert held == set(source.tensors) - {Key("embed")}, (
        "norms and the output head count, embeddings are read by rows"
    )
    source.close()
    covered = {layer for rank in made.ranks for layer in range(*rank.layers)}
    assert covered == set(range(config.n_layers))


def test_wire_bytes() -> None:
    made = planned("llama3", 4, "layout.stages=2", "layout.shards=2")
    source = open_source(MODELS / "llama3", "none")
    config = config_of(source)
    blocks = -(-config.hidden // 32)
    all_reduce = 2.0 * config.n_layers * 2 * 4 * config.hidden
    assert made.wire == {"all_reduce": all_reduce, "pipe": 2.0 * 4 * config.hidden}
    made = planned("llama3", 4, "layout.stages=2", "layout.shards=2", "wire.between_stages=q8_0")
    assert made.wire == {"all_reduce": all_reduce, "pipe": 2.0 * 34 * blocks}
    made = planned("llama3", 4, "layout.stages=2", "layout.shards=2", "wire.activations=q8_0")
    all_reduce = 2.0 * config.n_layers * 2 * 34 * blocks
    assert made.wire == {"all_reduce": all_reduce, "pipe": 2.0 * 4 * config.hidden}
    assert plan.wire_bytes(config, 1, 1, BlockType.F32, BlockType.F32, shared=True) == {
        "all_reduce": 0.0,
        "pipe": 0.0,
    }
    # Four shards read each other's rows in memory; between hosts each sums a quarter of a row.
    rows = [
        plan.wire_bytes(config, 1, 4, BlockType.F32, BlockType.F32, shared)["all_reduce"]
        / (2 * config.n_layers * 4 * config.hidden)
        for shared in (True, False)
    ]
    assert rows == [12, 6]
    rounded = plan.wire_bytes(config, 1, 4, BlockType.Q8_0, BlockType.F32, shared=False)["all_reduce"]
    assert rounded == 2 * config.n_layers * 3 * (34 + 52) * blocks
    source.close()


def test_lines_of_the_input_take_memory_on_the_first_rank(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a", "max_tokens": 0}\n' * 3000)
    read = "memory.loader=read"  # whose buffers stay, however many logits there are
    asked = spec.load(None, [read], model=str(MODELS / "llama3"), input=str(tmp_path / "in"), output="out")
    with_input, without = plan.make(asked, 2), planned("llama3", 2, read)
    more = [one.process - other.process for one, other in zip(with_input.ranks, without.ranks, strict=True)]
    prompts = (with_input.stages * with_input.step_sequences + 1) * (3 + SPECIAL) * input_memory.PROMPT
    assert more == [input_needs.line_bytes(3000) + 3000 * input_needs.WRITTEN + prompts, 0]


def test_a_budget_smaller_than_the_share_is_streamed() -> None:
    whole = planned("llama3", 1).ranks[0]
    budget = (whole.weights_share + whole.weights_minimum) // 2
    cycle = planned("llama3", 1, f"memory.weights={budget}").ranks[0]
    lru = planned("llama3", 1, f"memory.weights={budget}", "memory.policy=lru").ranks[0]
    assert cycle.weights_held == budget
    assert 0 < cycle.weights_streamed < lru.weights_streamed == whole.weights_share


def test_what_does_not_fit_is_said() -> None:
    made = planned("llama3", 2, "memory.weights=1KiB", "memory.kv=1KiB", "layout.stages=1")
    weights, kv = made.problems
    least = weights.split("at least ")[1].split()[0]  # what is asked for is enough, though it is rounded
    assert not planned("llama3", 2, f"memory.weights={least}", "layout.stages=1").problems
    assert weights.startswith("memory.weights = 1KiB is too small: some rank needs at least ")
    assert weights.endswith("for two neighbouring pages; raise it or use more shards.")
    assert kv.startswith("memory.kv = 1KiB is too small: 32 tokens take ")
    assert " ".join(plan_text.as_text(made).split()).endswith(f"{weights} {kv}")
    with pytest.raises(LayoutError, match="cannot be laid out on 7 ranks"):
        planned("llama3", 7)


def test_the_table() -> None:
    made = planned("llama3", 4, "memory.kv=1MiB")
    text = plan_text.as_text(made)
    said = " ".join(text.split())  # lines end where a terminal of 80 columns does
    assert "layout    1 stage x 4 shards on 4 ranks" in text
    assert "also possible: 2 stages x 2 shards; 4 stages x 1 shard" in text
    assert "KV cache  f32, holds 4096 tokens: 8.0 requests of 512 tokens at once" in text
    assert "shards send f32, so answers do not depend on their number (those of a stage share a host)" in said
    rounded = " ".join(plan_text.as_text(planned("llama3", 4, "wire.activations=q8_0")).split())
    assert "less than float32" in rounded
    assert (
        "shards send Q8_0, so the last digits of answers depend on their number, 4 (wire.activations"
        in rounded
    )
    assert "shards send" not in plan_text.as_text(planned("llama3", 1))
    assert len(next(line for line in text.splitlines() if line.startswith("rank")).split("  ")) > 8
    together = shown_bytes(sum(rank.held for rank in made.ranks))
    assert said.endswith(
        f"It fits if every rank has the free memory of its last column. On one machine all ranks need {together}."
    )
    alone = plan_text.as_text(planned("llama3", 1))
    assert alone.endswith("It fits if every rank has the free memory of its last column.")
    assert planned("llama3", 1).kv_type == "f32"
    assert planned("llama3", 1, "quantize=q8_0").kv_type == "f16"


@pytest.mark.parametrize("type", ["q8_0", "q8_0_int8"])
def test_a_kv_cache_of_int8(type: str) -> None:
    """34 bytes for 32 values; heads must be made of whole blocks."""
    f16, q8 = (planned(str(gguf_path("llama_mixed")), 1, f"memory.kv_type={kind}") for kind in ("f16", type))
    assert q8.kv_type == type
    assert q8.kv_tokens // KV_BLOCK == f16.kv_tokens // KV_BLOCK * 64 // 34
    words = f'memory.kv_type = "{type}" needs heads of a multiple of 32 dimensions, and this model\'s have 8'
    with pytest.raises(JobError, match=re.escape(words)):
        planned("llama3", 1, f"memory.kv_type={type}")


def test_as_json() -> None:
    assert msgspec.json.decode(plan.as_json(planned("llama3", 1)), type=Plan) == planned("llama3", 1)


def test_replicas_hold_the_whole_model_each() -> None:
    alone, made = planned("llama3", 2, "layout.shards=1"), planned("llama3", 3, "layout.replicas=2")
    assert [(rank.rank, rank.replica, rank.stage) for rank in made.ranks] == [(0, 0, 0), (1, 0, 1), (2, 1, 0)]
    weights = [rank.weights_share for rank in made.ranks]
    assert weights == [
        *(rank.weights_share for rank in alone.ranks),
        planned("llama3", 1).ranks[0].weights_share,
    ]
    text = " ".join(plan_text.as_text(made).split())
    assert "2 replicas (1 of 2 stages x 1 shard, 1 of 1 stage x 1 shard) on 3 ranks" in text
    even = plan_text.as_text(planned("llama3", 4, "layout.replicas=2"))
    assert "2 replicas of 1 stage x 2 shards on 4 ranks" in even
    with pytest.raises(LayoutError, match=r"layout\.replicas = 3 needs at least 3 ranks"):
        planned("llama3", 2, "layout.replicas=3")


def on(hosts_: list[Host], *overrides: str, ranks: int | None = None, model: str = "llama3") -> Plan:
    machines = hosts.machines_of(hosts_, ranks)
    job = spec.load(None, overrides, model=str(MODELS / model), input="in", output="out")
    return plan.make(job, machines.ranks, machines)


def test_time_follows_the_speeds_of_hosts() -> None:
    products = {"f32": [1.0, 2.0, 4.0]}
    slow = Host(
        memory="8GiB", name="slow", products=products, memory_gbs=1, disk_gbs=0.1, latency_us=50, mbit=100
    )
    fast = msgspec.structs.replace(slow, name="fast", products={"f32": [100.0, 200.0, 400.0]}, memory_gbs=100)
    assert on([fast]).time.seconds < on([slow]).time.seconds
    pipeline = on([fast, slow, fast], "layout.replicas=1", "layout.stages=3")
    assert pipeline.time.slowest == "rank 1 on slow"
    assert "slowest: rank 1 on slow; stages wait" in plan_text.as_text(pipeline)
    assert (on([fast]).time.measured, on([Host(memory="1GiB")]).time.measured) == (True, False)
    assert "(assumed speeds: mpillm doctor --output measures them)" in plan_text.as_text(
        on([Host(memory="1GiB")])
    )
    assert pipeline.gains["twice the network's rate"] >= 1
    assert on([slow]).gains["one more host like the last one"] > 1.5


def test_what_more_of_something_brings_is_said_also_if_it_is_nothing() -> None:
    text = " ".join(plan_text.as_text(planned("llama3", 1)).split())
    assert "no faster with 1 GiB more of memory.kv or 1 GiB more of memory.weights" in text
    made = planned("llama3", 1, "memory.weights=60KiB")
    assert made.gains["1 GiB more of memory.weights"] > 1.03
    text = plan_text.as_text(made)
    assert f"{made.gains['1 GiB more of memory.weights']:.2f} times as fast with 1 GiB more" in text
    assert "no faster with 1 GiB more of memory.kv\n" in text


def test_long_names_of_hosts_stay_within_80_columns() -> None:
    hosts = [Host(memory="8GiB", name=f"{'node-with-a-long-name-' * 5}{number}") for number in range(3)]
    text = plan_text.as_text(on(hosts, "layout.replicas=1", "layout.stages=3"))
    assert "slowest: rank" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_page_that_is_streamed_is_no_larger_than_one_of_them() -> None:
    """The head, which is the largest page and stays, says nothing of what is read."""
    with closing(open_source(MODELS / "llama3", "none")) as source:
        pages = rank_plans(config_of(source), Place(0, 1, 1), source)
    sizes = sorted(page.nbytes for page in pages)
    budget = sum(sizes) - sizes[0]
    small, every = (streamed_page(pages, own, "cycle") for own in (budget, None))
    assert sizes[0] <= small < every == pytest.approx(sum(sizes) / len(sizes))


def test_the_first_step_of_each_layer_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers' kernels are made, a stage's after another's, while weights are loaded."""
    layers = planned("llama3", 1).ranks[0].layers[1]
    for stages in (1, 2):
        seconds = []
        for first in (0.0, 1e-9, 10.0, 20.0):
            monkeypatch.setattr(job_time, "FIRST", first)
            seconds.append(planned("llama3", stages, f"layout.stages={stages}").time.seconds)
        assert seconds[0] == seconds[1]
        assert seconds[3] - seconds[2] == pytest.approx(10.0 * layers / ASSUMED.core)


def test_memory_that_is_written_for_the_first_time_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights are made ready in, the KV cache, the rows of a step; not what is mapped from its file."""
    monkeypatch.setattr(job_time, "FIRST", 0.0)
    for model, settings in (
        ("llama3", ("quantize=q8_0",)),
        ("smol_bf16", ()),
        ("smol_bf16", ("memory.loader=read",)),
    ):
        made = [
            on([Host(memory="1GiB", fill_gbs=fill)], *settings, model=model)
            for fill in (1.0, ASSUMED.fill / 1e9)
        ]
        rank = made[0].ranks[0]
        least = rank.kv_held + rank.activations
        new = (made[0].time.seconds - made[1].time.seconds) / (1e-9 - 1 / ASSUMED.fill)
        if model == "smol_bf16" and not settings:
            assert least < new < least + rank.weights_share / 10
        else:
            assert new == pytest.approx(least + rank.weights_share, rel=1e-3)


def test_hosts_without_names_are_numbered() -> None:
    assert hosts.alike(5, 2, 2**33).host_names() == ["host 1", "host 2", "host 3"]
    listed = [Host(memory="1GiB"), Host(memory="1GiB", name="pi", count=2), Host(memory="1GiB", count=2)]
    assert hosts.machines_of(listed).host_names() == ["host 1", "pi (1)", "pi (2)", "host 4", "host 5"]


def test_hosts_that_slow_a_run_down_are_left_out() -> None:
    """A pipeline over a slow host, or over a slow network, is slower than a part of the hosts."""
    fast = Host(memory="1GiB", name="fast", products={"f32": [10.0, 20.0, 40.0]}, mbit=0.1, latency_us=5e4)
    slow = msgspec.structs.replace(fast, name="slow", products={"f32": [0.01, 0.02, 0.04]})
    made = on([slow, fast, fast], "layout.replicas=1")
    assert (made.left_out, len(made.ranks)) == (["slow", "fast"], 1)
    assert "left out, because they would slow the run down: slow and fast\n" in plan_text.as_text(made)
    assert on([fast], "layout.replicas=1").time.seconds == made.time.seconds
    many = on([fast, msgspec.structs.replace(slow, count=10)], "layout.replicas=1")
    assert (len(many.left_out), len(many.ranks)) == (10, 1)
    assert "slow (1), slow (2) and 8 other hosts" in " ".join(plan_text.as_text(many).split())
    assert on([slow, fast, fast], "layout.stages=3").left_out == []


def test_faster_hosts_get_more_layers_as_their_memory_allows() -> None:
    fast = Host(memory="8GiB", name="fast", products={"f32": [0.04, 0.04, 0.04]})
    slow = Host(memory="8GiB", name="slow", products={"f32": [0.01, 0.01, 0.01]})
    asked = ["layout.replicas=1", "layout.stages=2"]
    made = on([slow, fast], *asked)
    assert [len(range(*rank.layers)) for rank in made.ranks] == [1, 3]
    assert made.reason.endswith("; layers by speed and memory: 1-3")
    assert [len(range(*rank.layers)) for rank in on([fast, fast], *asked).ranks] == [2, 2]
    need = on([fast, fast], *asked, "memory.kv=2GiB").ranks[1].held  # for two of four layers
    tight = msgspec.structs.replace(fast, memory=need)
    assert [len(range(*rank.layers)) for rank in on([slow, tight], *asked, "memory.kv=2GiB").ranks] == [2, 2]


def test_hosts_have_budgets_of_their_own() -> None:
    pi, nuc = Host(memory="8GiB", name="pi"), Host(memory="8GiB", name="nuc")
    budgets = "memory.kv={pi='1MiB', nuc='3MiB'}"
    made = on([pi, nuc], "layout.replicas=1", "layout.stages=2", budgets)
    # As many blocks on both, for as many layers.
    assert [rank.kv_held for rank in made.ranks] == [
        2**20,
        2**20,
    ]
    weights = f"memory.weights=['all', {made.ranks[1].weights_share - 1}]"
    paged = on([pi, nuc], "layout.replicas=1", "layout.stages=2", weights)
    assert [rank.weights_streamed > 0 for rank in paged.ranks] == [False, True]


@pytest.mark.parametrize("model", ["llama3", "qwen3_moe_step", "smol_bf16"])
@pytest.mark.parametrize("quantize", ["none", "q4_0"])
def test_a_configuration_alone_is_planned_as_the_model(model: str, quantize: str, tmp_path: Path) -> None:
    config = json.loads((MODELS / model / "config.json").read_text())
    config["dtype"] = "bfloat16" if model == "smol_bf16" else "float32"
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = planned(model, 2, f"quantize={quantize}")
    for path in (tmp_path, tmp_path / "config.json"):
        paper = planned(str(path), 2, f"quantize={quantize}")
        assert [rank.weights_share for rank in paper.ranks] == [rank.weights_share for rank in whole.ranks]
        assert (paper.layouts, paper.kv_tokens, paper.weights) == (
            whole.layouts,
            whole.kv_tokens,
            whole.weights,
        )
        assert paper.time.seconds == whole.time.seconds
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ModelError, match="has quantised weights, whose types only the files say"):
        planned(str(tmp_path), 2)


def test_what_hosts_do_not_have_is_a_problem() -> None:
    made = on([Host(memory="1MiB", name="tiny")])
    (problem,) = made.problems
    assert problem.startswith("Rank 0 on tiny would hold ")
    assert "and 1.0 MiB are free; lower memory.weights or memory.kv, or use more ranks." in problem
    several = plan_text.as_text(on([Host(memory="1MiB", count=2)], "layout.stages=2"))
    assert "1.0 MiB are free (1 other rank would hold too much as well); lower" in " ".join(several.split())
    assert max(map(len, several.splitlines())) <= plan_text.COLUMNS


def test_what_fits_is_judged_by_what_hosts_have() -> None:
    made = on([Host(memory="64GiB"), Host(memory="8GiB")])
    held = shown_bytes(made.ranks[1].held)
    assert f"free memory: rank 1 needs the largest part, {held} of 8.0 GiB. On one machine" in " ".join(
        plan_text.as_text(made).split()
    )


def test_ranks_without_a_core_are_in_reserve(tmp_path: Path) -> None:
    file = tmp_path / "hosts.toml"
    hosts.write(file, [Host(memory=2**33, name="a", ranks=4, cores=2), Host(memory=2**33, name="b", ranks=2)])

    def made(*settings: str) -> Plan:
        job = spec.load(None, settings, model=str(MODELS / "llama3"), input="in", output="out")
        return plan.make(job, 6, hosts.read(file))

    few, every = made(), made("layout.replicas=2")
    assert few.in_reserve == ["on a, 2 of 4 ranks are kept in reserve, because there are only 2 cores"]
    assert few.in_reserve[0] in " ".join(plan_text.as_text(few).split())
    assert (len(few.ranks), len(every.ranks), every.in_reserve) == (4, 6, [])
    paged = made("memory.weights=64MiB")
    assert (len(paged.ranks), paged.in_reserve) == (6, []), "a budget is that of each rank"
    assert few.free == [2**32] * 4  # those that compute share what is free
    machines = hosts.read(file)
    assert machines.computing("auto")[0].speeds[0] == machines.speeds[0].shared_by(0.5)


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": [5, 6], "max_tokens": 3}\n' * 40)
    job = spec.load(
        None, ["memory.weights=90KiB", "layout.replicas=2"], model=str(MODELS / "llama3"), input=str(tmp_path / "in"),
        output="out",
    )  # fmt: skip
    made = plan.make(job, 4, hosts.alike(4, 4, None))
    assert (made.time.requests, made.time.prompt_tokens, made.time.generated_tokens) == (40, 80, 120)
    table = [line for line in plan_text.as_text(made).splitlines() if re.match(r" *(rank|\d+)  ", line)]
    assert len(table) == 5
    assert max(map(len, table)) <= 80


def test_many_ranks_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of hundreds of ranks would leave nothing else on the screen."""
    made = planned("llama3", 4, "layout.stages=2", "layout.replicas=1")
    monkeypatch.setattr(plan_text, "MANY", 3)
    table, _, note = plan_text.as_text(made).split("\n\n")[1].rpartition("\n")
    head, *rows = [line.split() for line in table.splitlines()]
    assert head[:4] == ["ranks", "stage", "shard", "layers"]
    assert sum(int(row[0]) for row in rows) == 4
    assert len(rows) < 4
    last = [rank.layers for rank in made.ranks][-1]
    assert rows[-1][:4] == ["2", "1", "0-1", f"{last[0]}-{last[1] - 1}"]
    assert note == "Ranks that take the same memory share a row; --json lists each."
