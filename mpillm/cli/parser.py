"""An argument parser whose errors tell what to type instead."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from mpillm.cli import instead
from mpillm.errors import JobError

HIDDEN = {"ranks"}  # commands that people do not type


class CommandParser(argparse.ArgumentParser):
    """Says what to type instead, where that can be guessed."""

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        options, unknown = self.parse_known_args(words)
        if unknown:
            self.error(self._instead(options.command, unknown, words))
        return options

    def _instead(self, command: str | None, unknown: list[str], words: Sequence[str]) -> str:
        """Return a sentence on the words that mean nothing; the first one that can be explained decides."""
        parser = self._commands().get(command or "", self)
        known = [name for action in parser._actions for name in action.option_strings]
        before = [name for action in self._actions for name in action.option_strings]
        if found := instead.sentence(command or "", unknown, words, known, before):
            return found
        if not unknown[0].startswith("-"):
            usage = " ".join(parser.format_usage().split()).replace("usage:", "type").replace(" [-h]", "")
            return f"{unknown[0]!r} is an unexpected argument; {usage}"
        wanted = [
            _shown(action) for action in parser._actions if action.required and not action.option_strings
        ]
        usage = f"type {parser.prog} {' '.join(wanted)}; " if wanted else f"{parser.prog} "
        return f"there is no option {unknown[0]}; {usage}--help lists all"

    def _commands(self) -> Mapping[str, argparse.ArgumentParser]:
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return found[0].choices if found else {}

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and what to type instead where that can be guessed."""
        if given := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            commands = [name for name in re.findall(r"[\w-]+", given[2]) if name not in HIDDEN]
            message = f"there is no command {given[1]!r}; {instead.of_command(given[1], commands)}"
        elif given := re.match(r"(argument .*): invalid (\w+) value: (.*)", message):
            kind = "number" if given[2] == "float" else "whole number"
            message = f"{given[1]}: {given[3]} is not a {kind}"
            if given[0].startswith("argument -n: ") and given[3] == "'p'":  # -np, as mpiexec has it
                message = "there is no option -np; type -n N, or mpiexec -np N python -m mpillm"
        elif message == "argument --mpi-option: expected one argument":  # and an option is no argument
            message = f"{message}; type --mpi-option=WORD"
        elif message.startswith("the following arguments are required"):
            wanted = [action for action in self._actions if action.required]
            shown = [" ".join([*action.option_strings[-1:], _shown(action)]) for action in wanted]
            message = f"{message}; type {self.prog} {' '.join(shown)}"
        elif given := re.match(r"(argument .*): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            words = re.findall(r"[\w-]+", given[3])
            close = difflib.get_close_matches(given[2].lower(), words, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            message = f"{given[1]}: {given[2]!r} is not one of {', '.join(words)}{meant}"
        elif not re.search(r"type |did you mean|none of|--help", message):
            message = f"{message}; {self.prog} --help lists all"
        self.exit(JobError.exit_code, f"{self.prog}: {message}\n")


def _shown(action: argparse.Action) -> str:
    """Return the value of an argument as it is written in a sentence."""
    return "|".join(action.choices) if action.choices else str(action.metavar or action.dest.upper())


def positive(text: str) -> int:
    """Return a whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
