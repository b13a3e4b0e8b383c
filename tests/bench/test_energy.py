"""Energy: counters of a tree like Linux's, and what the machine at hand tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpillm.bench import tables
from mpillm.bench.energy import EnergyMeter
from mpillm.bench.result import Bench, Machine, Run
from mpillm.bench.runs import TimedStep, _typical


def zone(root: Path, number: str, name: str, energy: str, top: int = 999_999) -> Path:
    made = root / f"intel-rapl:{number}"
    made.mkdir()
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", f"{top}")):
        (made / file).write_text(f"{text}\n")
    return made


def test_packages_are_summed_and_counters_begin_anew(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", "900000")
    second = zone(tmp_path, "1", "package-1", "100000")
    zone(tmp_path, "0:0", "core", "5")
    zone(tmp_path, "2", "psys", "7")
    zone(tmp_path, "3", "package-2", "unreadable")
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    assert before == {first: 900_000, second: 100_000}
    (first / "energy_uj").write_text("400000\n")  # past 999,999
    (second / "energy_uj").write_text("350000\n")
    assert meter.joules(before, meter.read()) == pytest.approx(0.5 + 0.25)


def test_nothing_tells_or_this_machine_does(tmp_path: Path) -> None:
    none = EnergyMeter(tmp_path)
    assert none.joules(none.read(), none.read()) is None
    own = EnergyMeter()
    before = own.read()
    taken = own.joules(before, own.read())
    assert (taken is None) == (not before)
    assert taken is None or taken >= 0


def test_a_tokens_joules_are_shown_where_they_are_known() -> None:
    prefill = Run(what="prefill", threads=1, sequences=1, tokens=8)
    assert _typical([TimedStep(6, 0, 2.0, 5.0), TimedStep(2, 1, 1.0, 1.0)], prefill) == TimedStep(
        8, 0, 3.0, 6.0
    )
    decode = Run(what="batch", threads=1, sequences=4, tokens=1, rate=4.0, seconds=1.0)
    steps = [TimedStep(8, 2, 9.0, 90.0), TimedStep(0, 4, 1.0, 2.0), TimedStep(0, 4, 3.0, 6.0)]
    assert _typical(steps, decode) == TimedStep(0, 4, 2.0, 4.0)
    made = Bench(
        version="", began="", command=[], ranks=1, hosts=1, model="", model_bytes=1, stages=1, shards=1,
        machine=Machine(cpu="", cores=1, kernels="", read={}, int8={}), kernels=[], runs=[decode],
    )  # fmt: skip
    assert "J a token" not in tables.as_text(made)
    decode.joules = 1.25
    assert "J a token" in tables.as_text(made)
    assert "1.25" in tables.as_text(made)
