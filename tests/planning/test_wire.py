"""The wire between shards where a job leaves it open: f32, unless a slow network is between them; and it is kept."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any, cast

import pytest

from mpillm import spec
from mpillm.comm.program import start
from mpillm.model.opening import config_of, open_source
from mpillm.planning import layout
from mpillm.planning.hosts import Host, machines_of
from mpillm.planning.layout_plans import Chosen
from mpillm.planning.planner import Planner
from mpillm.run import context
from mpillm.run.job import results_differ
from mpillm.spec import Spec, WireSection
from mpillm.store.records import UsedLayout
from tests.model.golden import model_path

MODEL = model_path("llama3")
GIGABIT = Host(memory="8GiB", latency_us=50, mbit=1000)


def job(*settings: str) -> Spec:
    return spec.load(None, settings, model=str(MODEL), input="in", output="out")


def chosen(hosts: list[Host], *settings: str) -> Chosen:
    asked = job(*settings)
    with closing(open_source(MODEL)) as source:
        layouts = layout.Layouts(asked, Planner(source, config_of(source)), asked.layout.replicas)
        return layouts.choose(machines_of(hosts)).chosen


@pytest.mark.parametrize("shards", [2, 4])
def test_the_network_between_shards_decides(shards: int) -> None:
    settings = f"layout.shards={shards}", "layout.replicas=1"
    fast = [
        replaced(GIGABIT, mbit=100_000.0, latency_us=500.0)
    ] * shards  # bytes are nothing beside the latency
    slow = [replaced(GIGABIT, mbit=0.5, latency_us=1.0)] * shards
    found = chosen(fast, *settings)
    assert (found.wire, found.wire_reason) == (
        "f32",
        "the network between the hosts makes f32 no slower",
    )
    found = chosen(slow, *settings)
    assert found.wire == "q8_0"
    assert found.wire_reason.startswith("over the network between the hosts f32 would take ")
    assert chosen(slow, *settings, "wire.activations=f32").wire == "f32"
    assert chosen(fast, *settings, "wire.activations=q8_0").wire == "q8_0"
    # However slow the network, what does not go over it is exact.
    together = replaced(slow[0], ranks=shards)
    assert chosen([together], *settings).wire == "f32"
    assert chosen([together] * 2, f"layout.shards={shards}").wire == "f32"
    assert chosen(slow, "layout.shards=1").wire == "f32"


def replaced(host: Host, **values: Any) -> Host:
    return Host(**({name: getattr(host, name) for name in host.__struct_fields__} | values))


@pytest.mark.parametrize("wire", ["q8_0", "f32"])
def test_a_run_goes_on_with_the_wire_that_it_began_with(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(*settings: str) -> tuple[str, int | None]:
        with ExitStack() as stack:
            found, shards = context.RankContext(
                start(), job(*settings), cast("Any", None), stack, cast("Any", None)
            ).kept(None)
        return found.wire.activations, shards

    monkeypatch.setattr(context.RankContext, "claim", None)
    monkeypatch.setattr(context, "first_layout", lambda claim: None)
    assert kept() == ("auto", None)
    monkeypatch.setattr(context, "first_layout", lambda claim: UsedLayout(3, 2, wire))
    assert kept() == (wire, 2 if wire == "q8_0" else None)
    assert kept("wire.activations=q8_0") == ("q8_0", 2)
    assert kept("wire.activations=f32") == ("f32", None)


def test_layouts_that_give_other_answers() -> None:
    auto, exact = WireSection(), WireSection(activations="f32")
    one, two, four = (UsedLayout(1, shards, "q8_0") for shards in (1, 2, 4))
    assert results_differ(two, four, auto)
    assert results_differ(one, two, auto)
    assert not results_differ(two, four, exact)  # a journal of a version that did not note the wire
    assert not results_differ(one, UsedLayout(2, 4, "f32"), auto)
    assert results_differ(two, UsedLayout(1, 2, "f32"), auto)
    assert results_differ(
        UsedLayout(1, 1, "f32"), UsedLayout(2, 1, "f32"), WireSection(between_stages="q8_0")
    )
