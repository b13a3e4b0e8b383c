"""What the disturbed jobs ask for: lines of all kinds, with and without an adapter, and jobs that are not theirs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.jobs import mixed_lines, write_lines
from tests.model.golden import FIXTURES

TUNED = "tuned"  # what lines call the adapter
ADAPTER, OTHER_ADAPTER = (FIXTURES / "adapters" / name for name in ("chat_all", "chat_some"))


def lines(count: int) -> list[dict[str, Any]]:
    """So many lines: the mixed ones, some of them for the adapter or held to a grammar, and pairs and choices."""
    draw = random.Random(5)
    made = mixed_lines(count, seed=5, tokens=30)
    for number, line in enumerate(made):
        body = line["body"]
        if number % 8 == 0:
            body["model"] = TUNED
        elif number % 8 == 4:
            body["guided_regex"] = "[a-z]{2,9}( fox| dog){1,4}"
        elif number % 16 == 3:
            prompt, choices = body["input"], draw.sample((" fox", " dog", " the box", " seven wizards"), 3)
            line.update(
                url="/v1/multiple_choice", body={"prompt": prompt, "choices": choices, "model": TUNED}
            )
        elif number % 16 == 11:
            line.update(url="/v1/rerank", body={"query": "the fox", "documents": [body["input"], "a dog"]})
    return made


@dataclass(frozen=True)
class Command:
    """A job's input, and the settings that decide its answers."""

    source: Path
    settings: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The settings as the command line has them."""
        return [f"{name}={value}" for name, value in self.settings.items()]


class Commands:
    """The command of all jobs, and others that must be refused where one of them has begun."""

    def __init__(self, folder: Path, count: int, draw: random.Random) -> None:
        self._folder, self._draw = folder, draw
        self.adapter = shutil.copytree(ADAPTER, folder / "adapter")
        self._lines = lines(count)
        source = write_lines(folder / "in.jsonl", self._lines)
        self.own = Command(source, {f"adapters.{TUNED}": str(self.adapter)})
        self._others: dict[str, Callable[[], Command]] = {
            "sampled otherwise": lambda: self._with({"sampling.temperature": "0.3"}),
            "another adapter": lambda: self._with({f"adapters.{TUNED}": str(OTHER_ADAPTER)}),
            "an adapter more": lambda: self._with({"adapters.more": str(OTHER_ADAPTER)}),
            "without its adapter": lambda: Command(self.own.source),
            "a line for another endpoint": lambda: self._edited(self._for_another_endpoint),
            "a line less": lambda: self._edited(lambda made: made.pop(self._draw.randrange(len(made)))),
        }

    def another(self) -> tuple[str, Command]:
        """Something else to ask of a job's output directory, and what it is."""
        name = self._draw.choice(sorted(self._others))
        return name, self._others[name]()

    def _with(self, settings: dict[str, str]) -> Command:
        return Command(self.own.source, self.own.settings | settings)

    def _edited(self, edit: Callable[[list[dict[str, Any]]], object]) -> Command:
        made = json.loads(json.dumps(self._lines))
        edit(made)
        return Command(write_lines(self._folder / "other.jsonl", made), self.own.settings)

    def _for_another_endpoint(self, made: list[dict[str, Any]]) -> None:
        line = self._draw.choice([one for one in made if "input" in one["body"]])
        line.update(url="/v1/completions", body={"prompt": line["body"]["input"], "max_tokens": 2})
