"""`mpillm serve` and `mpillm chat` on the command line."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from mpillm import spec
from mpillm.cli.console import Console
from mpillm.cli.parser import positive
from mpillm.cli.terminal import launcher_input_ended, launcher_reads_terminal
from mpillm.comm.world import World
from mpillm.errors import JobError

KEY = "MPILLM_API_KEY"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    _add_model(parser)
    parser.add_argument(
        "--host", type=_host, default="127.0.0.1", help="address to listen on (127.0.0.1: only this machine)"
    )
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on (8000)")
    parser.add_argument(
        "--api-key",
        type=_key,
        metavar="KEY",
        default=None,
        help=f"API key that clients must send (${KEY}, or none)",
    )
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        type=_origin,
        metavar="ORIGIN",
        default=[],
        help="sites whose pages may ask the server from a browser, such as http://localhost:3000 (none; * for all)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("out/serve"),
        help="directory of uploaded files and batches (out/serve)",
    )
    parser.add_argument(
        "--max-waiting", type=positive, default=1024, help="maximum number of waiting requests (1024)"
    )


def _key(text: str) -> str:
    if text.strip():
        return text
    raise argparse.ArgumentTypeError("the key is empty; leave out --api-key for a server without one")


def _origin(text: str) -> str:
    if text in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s\"]+", text):
        return text
    raise argparse.ArgumentTypeError(f"{text} is not an origin; write http://HOST:PORT, or * for all pages")


def _host(text: str) -> str:
    given = re.fullmatch(r"(?:\w+://)?([^:/]+)(?::(\d+))?/?", text)
    if given and given[1] != text:
        port = f" --port {given[2]}" if given[2] else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a host; type --host {given[1]}{port}")
    return text


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port; ports are 0 (any free one) to 65535")
    return number


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="catalogue name, Hugging Face directory or GGUF file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the job, such as memory.kv=4GiB",
    )


def run(world: World, options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    try:
        from mpillm.serve import server
    except ImportError as error:
        raise JobError(
            f"mpillm serve needs more packages ({error.name}): pip install 'mpillm[serve]'."
        ) from None
    shared = _spec(world, options, str(options.data))
    settings = server.ServeOptions(
        options.host,
        options.port,
        options.api_key or os.environ.get(KEY) or None,
        options.max_waiting,
        tuple(options.allowed_origins),
    )
    return server.run(world, shared, settings, Console(lambda: world.rank == 0))


def run_chat(world: World, options: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from mpillm.serve import chat
    from mpillm.serve.typed import typed

    person = os.isatty(0) or launcher_reads_terminal()
    settings = _spec(world, options, "out/chat")
    return chat.run(world, settings, Console(lambda: world.rank == 0), typed(person, launcher_input_ended))


def _spec(world: World, options: argparse.Namespace, output: str) -> spec.Spec:
    """Return the settings of a job, on every rank; it has no input, and `output` is where files go if there are any."""
    for override in options.set:
        if override.partition("=")[0].strip() in ("input", "output", "output.path"):
            where = "stores its files in --data DIR" if hasattr(options, "data") else "writes no output"
            raise JobError(f"--set {override} is for a run: {options.command} reads no input and {where}.")
    return world.on_rank_0(
        lambda: spec.load(None, options.set, model=options.model, input=os.devnull, output=output)
    )
