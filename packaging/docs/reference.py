"""The page reference.md of the site, generated from the code (a hook of mkdocs).

Commands, keys of a job, endpoints, the server's URLs and metrics, exit codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from operator import attrgetter

import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mpillm import errors, spec
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.cli.arguments import command_parser
from mpillm.cli.parser import HIDDEN
from mpillm.engine.limits import Totals
from mpillm.serve import openapi
from mpillm.serve.metrics import Metrics

PAGE = "reference.md"
CODES = {
    0: "The command has finished.",
    1: "The run is complete, and some requests have an error.",
    70: "mpillm has a bug; the message says what to report.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site."""
    files.append(File.generated(config, PAGE, content="\n".join(page())))
    return files


def page() -> Iterator[str]:
    """The lines of the page."""
    yield "# Commands, keys, endpoints, exit codes\n\nThis page is generated from the code.\n\n## Commands\n"
    parser = command_parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for choice in subparsers._choices_actions:
        if choice.dest in HIDDEN:
            continue
        yield from _command(choice.dest, choice.help or "", subparsers.choices[choice.dest])
    yield "## Keys of a job\n\n[The job file](formats.md#the-job-file) explains them.\n"
    yield "| key | default |\n|---|---|"
    defaults = spec.Spec(input=".", output=spec.OutputSection(path="."))
    for key in spec.known_keys():
        value = "none" if key in ("input", "output.path") else _toml(attrgetter(key)(defaults))
        yield f"| {_code([key])} | {_code([value])} |"
    yield "\n## Endpoints\n\nThose of a batch and of `mpillm serve`. [Requests](requests.md) explains the keys.\n"
    for endpoint in ENDPOINTS:
        fields = msgspec.structs.fields(endpoint)
        required = [field.name for field in fields if field.required]
        yield f"### {endpoint.url}\n"
        optional = sorted(field.name for field in fields if not field.required)
        yield f"Required: {_code(required) or 'none'}. Optional: {_code(optional)}.\n"
    yield from _server()
    yield "\n## Exit codes\n\n| code | |\n|---|---|"
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


def _server() -> Iterator[str]:
    yield "## URLs of the server\n\n`/openapi.json` describes their parameters and results.\n"
    yield "| URL | |\n|---|---|"
    for url, methods in openapi.document()["paths"].items():
        for method, operation in methods.items():
            if "summary" in operation:
                yield f"| {_code([url])} | {method.upper()}: {operation['summary']} |"
    yield "\n## Metrics of the server\n\n`/metrics` returns them for Prometheus.\n\n| metric | |\n|---|---|"
    yield from (f"| {_code([name])} | {text} |" for name, text in Metrics(Totals()).described())


def _toml(value: object) -> str:
    """A default as a job file has it."""
    return "none" if value is None else msgspec.json.encode(value).decode()


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
