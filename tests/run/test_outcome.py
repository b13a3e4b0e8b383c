"""The output directory goes while the results are written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from mpillm.errors import Interrupted, OutputError
from mpillm.run import outcome
from mpillm.store.output import Claim


class Computing:
    def __init__(self, claim: Claim) -> None:
        self.check_output = claim.check


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_directory_that_goes_while_results_are_written(how: str, tmp_path: Path) -> None:
    """It is said as such, with the code of an interrupted run, whatever error the file system gives."""
    output = tmp_path / "out"

    def write(claim: Claim) -> None:
        with outcome._in_place(cast("Any", Computing(claim))):
            if how == "moved":
                output.rename(tmp_path / "away")
            else:
                shutil.rmtree(output)
            with claim.directory.replacing("results.jsonl") as file:
                file.write(b"{}\n")

    with Claim(output) as claim, pytest.raises(Interrupted, match=f"was {how} during the run"):
        write(claim)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with (
        Claim(tmp_path / "out") as claim,
        pytest.raises(OutputError, match="no"),
        outcome._in_place(cast("Any", Computing(claim))),
    ):
        raise OutputError("no")
