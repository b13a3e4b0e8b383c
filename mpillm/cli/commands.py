"""The commands; `arguments` has the words that they take.

Only rank 0 prints at the default level, on streams that never fail (see `streams`). A command that needs ranks runs
inside `program.guard`, which turns errors into one sentence and an exit code, and a failure of one rank into the end of
all; the others run without MPI, on rank 0 alone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence

from mpillm.cli import bench, serve, supervise, terminal
from mpillm.cli.arguments import FORMATS, command_parser
from mpillm.cli.console import Console
from mpillm.cli.job import job_of, job_on_every_rank, load_job
from mpillm.cli.streams import Unfailing
from mpillm.comm import launch
from mpillm.comm.program import guard
from mpillm.comm.running import run_alone
from mpillm.comm.world import World
from mpillm.errors import Interrupted, JobError
from mpillm.words import count_of

PLANNED_RANKS = 1024  # the maximum number of ranks in a plan; their layouts take some ten seconds
NEXT_STEPS = """\
next steps:
  mpillm launch -n 2 run                 eight questions to a small model
  mpillm launch -n 4 run --input prompts.jsonl --output out/mine      your own
  mpillm plan --model MODEL --ranks 4    will a model fit, and how fast is it
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    with _only_first_prints():
        options = command_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.command is None and launch.launched_by(os.environ) is None:
        command_parser().print_help()
        print(f"\n{NEXT_STEPS}", end="")
        return 0
    if options.command == "launch":
        _log(options.verbose, "mpillm:", quiet=False)
        return supervise.run(options, command_parser().parse_args, job_of, launch.launched_by(os.environ))
    if options.command == "lm-eval":
        if (started := launch.launched_by(os.environ)) is not None:
            return supervise.refused(
                started,
                "lm-eval starts its ranks by itself, without mpiexec: --model_args model=...,ranks=4.",
            )
        return run_alone(lambda: _lm_eval(options))
    alone = {
        "plan": _plan, "pull": _pull, "models": _models, "init": _init, "report": _report, "merge": _merge,
        "export": _export, "status": _status, "watch": _watch, "compare": _compare,
        "worker": _worker,
    }  # fmt: skip
    if options.command in alone:
        started = launch.launched_by(os.environ)
        if started is not None and started.rank > 0:
            return 0
        _log(options.verbose, "mpillm:", quiet=False)
        return run_alone(lambda: alone[options.command](options))
    if options.command == "ranks" and options.n > 1 and launch.launched_by(os.environ) is None:
        from mpillm.launching import ranks

        ranks.start(options.n, options.address)
    return guard(lambda world: _command(world, options))


@contextlib.contextmanager
def _only_first_prints() -> Iterator[None]:
    """Before MPI starts every rank parses the command line; only the first one prints what is wrong with it."""
    started = launch.launched_by(os.environ)
    with contextlib.ExitStack() as stack:
        if started is not None and started.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(Unfailing(None)))
            stack.enter_context(contextlib.redirect_stderr(Unfailing(None)))
        yield


def _command(world: World, options: argparse.Namespace) -> int:
    _log(options.verbose, str(world), quiet=world.rank > 0 and not options.verbose)
    commands = {
        "run": _run,
        "pack": _pack,
        "doctor": _doctor,
        "bench": bench.run,
        "ranks": _ranks,
        "serve": serve.run,
        "chat": serve.run_chat,
    }
    return commands[options.command or "run"](world, options)


def _log(verbose: int, who: str, quiet: bool) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=logging.ERROR if quiet else level, format=f"{who} %(message)s", stream=sys.stderr
    )


def _run(world: World, options: argparse.Namespace) -> int:
    from mpillm.run import runner  # loaded now that the number of threads is known

    progress = Console(lambda: world.rank == 0)
    spec = job_on_every_rank(world, options)
    report = runner.run(world, spec, progress, getattr(options, "trace", None))
    if report is None:
        return 0
    progress.finish(report, spec.output_path)
    return 1 if report.requests.errors else 0


def _plan(options: argparse.Namespace) -> int:
    from mpillm.planning import hosts, plan, plan_text, suggestion
    from mpillm.spec import UNREAD

    spec = load_job(options, planned=True)
    if options.input not in (None, UNREAD) and not spec.input_path.exists():
        print(
            f"mpillm: The input {options.input} does not exist; this plan is for a typical input.",
            file=sys.stderr,
        )
    if options.suggest is not None and options.json:
        raise JobError("--suggest prints a job file; leave out --json.")
    if options.hosts is not None:
        for name, value in (("--memory", options.memory), ("--ranks-per-host", options.ranks_per_host)):
            if value is not None:
                raise JobError(
                    f"{options.hosts} says what {name} says; change it there, or leave out {name}."
                )
        machines = hosts.read(options.hosts, options.ranks)
    else:
        machines = hosts.alike(options.ranks or 1, options.ranks_per_host or 1, options.memory)
    if machines.ranks > PLANNED_RANKS:
        raise JobError(
            f"plan takes up to {PLANNED_RANKS} ranks, not {machines.ranks}; type --ranks {PLANNED_RANKS}."
        )
    if options.suggest is not None:
        print(suggestion.job_file(spec, machines, options.suggest))
        return 0
    made = plan.make(spec, machines.ranks, machines)
    if made.unread_lines:
        print(
            f"mpillm: {options.input or spec.input} has {count_of(made.unread_lines, 'line')} without a valid request; "
            "run answers these with an error.",
            file=sys.stderr,
        )
    print(plan.as_json(made) if options.json else plan_text.as_text(made))
    return JobError.exit_code if made.problems else 0


def _worker(options: argparse.Namespace) -> int:
    from mpillm.tools.worker.worker import serve

    serve(
        options.host, options.port, options.nthreads, lambda text: print(f"mpillm: {text}", file=sys.stderr)
    )
    return 0


def _pack(world: World, options: argparse.Namespace) -> int:
    from mpillm.tools import pack

    console = Console(lambda: world.rank == 0)
    made = pack.pack(world, options.source, options.target, options.weights, console)
    console.say(
        f"{made.directory} is packed: {made.bytes / 1e6:.0f} MB in {count_of(made.files, 'file')}"
        f"{f' ({made.kept} by earlier runs)' if made.kept else ''}, in {made.seconds:.1f} s."
    )
    return 0


def _pull(options: argparse.Namespace) -> int:
    from mpillm.catalogue import models

    print(models.pull(options.name, Console().downloading))
    return 0


def _models(options: argparse.Namespace) -> int:
    from mpillm.catalogue import models
    from mpillm.model.families import architectures, gguf_architectures

    if not options.architectures:
        print("\n".join(models.listed()))
        print("\nOther models run too: mpillm models --architectures lists what is supported.")
        return 0
    for heading, names in (
        ("Supported architectures of Hugging Face directories (in config.json):", architectures()),
        ("Supported architectures of GGUF files:", gguf_architectures()),
    ):
        print(heading)
        shown = textwrap.wrap(", ".join(names), 78, break_on_hyphens=False)
        print(textwrap.indent("\n".join(shown), "  "))
    return 0


def _report(options: argparse.Namespace) -> int:
    from mpillm.store import report_page

    path, missing = report_page.write_html(options.directory, options.figures)
    print(path)
    if options.figures:
        print(options.figures)
    if missing:
        print(missing, file=sys.stderr)
    return 0


def _init(options: argparse.Namespace) -> int:
    from mpillm.tools import init

    print("\n".join(init.init(options.what, options.directory)))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from mpillm.store import merge

    made = merge.merge(options.parts, options.output)
    if made.renamed:
        print("The parts share custom_ids, so each custom_id begins with the name of its part.")
    requests = f"{count_of(made.requests, 'request')} of {count_of(made.parts, 'part')}"
    print(f"{options.output}: {requests}, {made.errors} with an error.")
    return 0


def _export(options: argparse.Namespace) -> int:
    from mpillm.store import table

    suffix = options.output.suffix.removeprefix(".") if options.output else ""
    if suffix in FORMATS and options.format not in (None, suffix):
        raise JobError(
            f"{options.output} is not called like --format {options.format}; leave one of them out."
        )
    if suffix and options.format is None and suffix not in FORMATS:
        endings = ", ".join(f".{format}" for format in FORMATS)
        raise JobError(f"{options.output} ends in none of {endings}; choose one of them, or add --format.")
    wanted = options.format or suffix
    format = next((format for format in FORMATS if format == wanted), FORMATS[0])
    print(table.export(options.directory, format, options.output, options.input))
    return 0


def _status(options: argparse.Namespace) -> int:
    from mpillm.store.readable import as_json
    from mpillm.store.watching import reader_of

    with contextlib.closing(reader_of(options.directory)) as reader:
        now = reader.look()
    print(as_json(now).decode() if options.json else "\n".join(now.lines()))
    return now.exit_code


def _watch(options: argparse.Namespace) -> int:
    from mpillm.store.watching import watch, when_begun

    def say(line: str) -> None:
        print(line, flush=True)

    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(contextlib.closing(when_begun(options.directory, say)))
        except Interrupted as stopped:
            return stopped.exit_code
        with contextlib.suppress(Interrupted):  # Ctrl-C ends the watching, and not the run
            watch(reader, options.every, say)
        now = reader.look()
    print("\n".join(now.lines()))
    return now.exit_code


def _compare(options: argparse.Namespace) -> int:
    from mpillm.api.compare import compare
    from mpillm.api.results import read_results

    made = compare(read_results(options.first), read_results(options.second))
    print("\n".join(made.lines()))
    return 0 if made.same else 1


def _lm_eval(options: argparse.Namespace) -> int:
    try:
        from mpillm.api import lm_eval
    except ImportError as error:
        raise JobError(f"lm-eval needs a library: pip install 'mpillm[lm-eval]' ({error}).") from None
    return lm_eval.run(options.words)


def _ranks(world: World, options: argparse.Namespace) -> int:
    from mpillm.api import ranks

    return ranks.serve(world, options.address)


def _doctor(world: World, options: argparse.Namespace) -> int:
    world.limit_threads(world.threads())  # before the kernels are loaded
    from mpillm.planning import hosts
    from mpillm.tools import doctor

    found = doctor.examine(world, options.model)
    if world.rank == 0:
        for line in found.lines():
            print(terminal.fitted(line, sys.stdout), flush=True)
        if options.output is not None:
            hosts.write(options.output, found.hosts)
            print(f"{options.output} is written; mpillm plan --hosts {options.output} reads it.", flush=True)
    return world.bcast(found.exit_code)
