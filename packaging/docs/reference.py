"""The page reference.md of the site, generated from the code: commands, endpoints and exit codes (a hook of mkdocs)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mpillm import errors
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.cli.arguments import command_parser

PAGE = "reference.md"
CODES = {
    0: "All is done.",
    1: "All is done, and some requests ended in an error.",
    70: "mpillm has a bug; the message says what to report.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site."""
    files.append(File.generated(config, PAGE, content="\n".join(page())))
    return files


def page() -> Iterator[str]:
    """The lines of the page."""
    yield "# Commands, endpoints, exit codes\n\nThis page is generated from the code.\n\n## Commands\n"
    parser = command_parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for choice in subparsers._choices_actions:
        yield from _command(choice.dest, choice.help or "", subparsers.choices[choice.dest])
    yield "## Endpoints\n\nOf a batch, and of `mpillm serve`. What the keys mean is in [requests](requests.md).\n"
    for endpoint in ENDPOINTS:
        fields = msgspec.structs.fields(endpoint)
        required = [field.name for field in fields if field.required]
        yield f"### {endpoint.url}\n"
        optional = sorted(field.name for field in fields if not field.required)
        yield f"Required: {_code(required) or 'none'}. Optional: {_code(optional)}.\n"
    yield "## Exit codes\n\n| code | |\n|---|---|"
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MpillmError)
    ]
    told = dict(CODES)
    for kind in kinds:
        if kind is not errors.MpillmError and kind.exit_code not in CODES:
            said = (kind.__doc__ or "").strip().splitlines()[0]
            told[kind.exit_code] = " ".join(filter(None, (told.get(kind.exit_code), said)))
    yield from (f"| {code} | {told[code]} |" for code in sorted(told))


def _command(name: str, about: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"### mpillm {name}\n\n{about[:1].upper()}{about[1:]}.\n"
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if not actions:
        return
    yield "| argument | |\n|---|---|"
    for action in actions:
        metavar = action.metavar if isinstance(action.metavar, str) else None
        value = metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        shown = [
            f"{option} {value}" if action.nargs != 0 else option for option in action.option_strings
        ] or [value]
        yield f"| {_code(shown)} | {(action.help or '').replace('|', chr(92) + '|')} |"
    yield ""


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words).replace("|", "\\|")
