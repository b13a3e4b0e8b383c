"""The commands, and the words that they take.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mpillm
from mpillm.cli import bench, serve, supervise
from mpillm.cli.console import Console
from mpillm.cli.streams import Unfailing
from mpillm.comm import launch
from mpillm.comm.program import guard
from mpillm.comm.running import run_alone
from mpillm.comm.world import World
from mpillm.errors import JobError

if TYPE_CHECKING:
    from mpillm.spec import Spec, TableFormat

NO_JOBS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")  # what an input may be called
FORMATS: tuple[TableFormat, ...] = ("csv", "parquet", "jsonl")
QUICKSTART = "quickstart.toml"
NEXT_STEPS = """\
next steps:
  mpillm launch -n 2 run                                       answer eight questions with the default small model
  mpillm launch -n 4 run --input prompts.jsonl --output out/mine                             answer your own
  mpillm plan --model MODEL --ranks 4                                        will a model fit, and how
"""
EXAMPLES = """\
examples:
  mpillm launch -n 2 run                                           the quickstart job on the default small model
  mpiexec -n 4 python -m mpillm run jobs/summaries.toml --set sampling.seed=3
  mpiexec -n 4 python -m mpillm run --model smollm2-135m --input requests.jsonl --output out/mine
  python -m mpillm plan jobs/large-model.toml --ranks 4
exit codes: 0 all done, 1 done but some requests ended in an error, 2 the job or the command is wrong,
75 interrupted (the same command goes on where it stopped)"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    with _only_first_prints():
        options = command_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.command is None and launch.launched_by(os.environ) is None:
        command_parser().print_help()
        print(f"\n{NEXT_STEPS}", end="")
        return 0
    if options.command == "launch":
        return supervise.run(options, _job_of)
    if options.command == "lm-eval":
        return run_alone(lambda: _lm_eval(options))
    alone = {
        "plan": _plan, "pull": _pull, "models": _models, "init": _init, "report": _report, "merge": _merge,
        "export": _export, "status": _status, "watch": _watch, "compare": _compare,
    }  # fmt: skip
    if options.command in alone:
        started = launch.launched_by(os.environ)
        if started is not None and started.rank > 0:
            return 0
        _log(options.verbose, "mpillm:", quiet=False)
        return run_alone(lambda: alone[options.command](options))
    if options.command == "ranks" and options.n > 1 and launch.launched_by(os.environ) is None:
        from mpillm.api import ranks

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
    spec = _spec(world, options)
    report = runner.run(world, spec, progress, getattr(options, "trace", None))
    if report is None:
        return 0
    progress.finish(report, spec.output_path)
    return 1 if report.requests.errors else 0


def _plan(options: argparse.Namespace) -> int:
    from mpillm.run import hosts, plan

    spec = _load(options)
    if options.hosts is not None:
        machines = hosts.read(options.hosts, options.ranks)
    else:
        machines = hosts.alike(options.ranks or 1, options.ranks_per_host, options.memory)
    if options.suggest is not None:
        print(plan.suggestion(spec, machines, options.suggest))
        return 0
    made = plan.make(spec, machines.ranks, machines)
    print(plan.as_json(made) if options.json else plan.as_text(made))
    return JobError.exit_code if made.problems else 0


def _pack(world: World, options: argparse.Namespace) -> int:
    from mpillm.tools import pack

    console = Console(lambda: world.rank == 0)
    made = pack.pack(world, options.source, options.target, options.weights, console)
    console.say(
        f"{made.directory} is packed: {made.bytes / 1e6:.0f} MB in {made.files} files"
        f"{f' ({made.kept} of them by earlier runs)' if made.kept else ''}, in {made.seconds:.1f} s."
    )
    return 0


def _pull(options: argparse.Namespace) -> int:
    from mpillm.run import catalogue

    print(catalogue.pull(options.name, Console().downloading))
    return 0


def _models(options: argparse.Namespace) -> int:
    from mpillm.run import catalogue

    print("\n".join(catalogue.listed()))
    return 0


def _report(options: argparse.Namespace) -> int:
    from mpillm.store import report_page

    path, missing = report_page.write_html(options.directory, options.figures)
    print(path)
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
        print("Parts have custom_ids in common, so every custom_id has its part's name in front.")
    print(f"{options.output}: {made.requests} requests, {made.errors} of them ended in an error.")
    return 0


def _export(options: argparse.Namespace) -> int:
    from mpillm.store import table

    suffix = options.output.suffix.removeprefix(".") if options.output else ""
    wanted = options.format or suffix
    format = next((format for format in FORMATS if format == wanted), FORMATS[0])
    print(table.export(options.directory, format, options.output, options.input))
    return 0


def _status(options: argparse.Namespace) -> int:
    from mpillm.store.readable import as_json
    from mpillm.store.status import Reader

    with contextlib.closing(Reader(options.directory)) as reader:
        now = reader.look()
    print(as_json(now).decode() if options.json else "\n".join(now.lines()))
    return now.exit_code


def _watch(options: argparse.Namespace) -> int:
    from mpillm.store.status import Reader, watch

    with contextlib.closing(Reader(options.directory)) as reader:
        now = watch(reader, options.every, lambda line: print(line, flush=True))
    print("\n".join(now.lines()))
    return now.exit_code


def _compare(options: argparse.Namespace) -> int:
    from mpillm.api.compare import compare
    from mpillm.api.results import read_results

    made = compare(read_results(options.first), read_results(options.second))
    print("\n".join(made.lines()))
    return 0 if made.same else 1


def _lm_eval(options: argparse.Namespace) -> int:
    if launch.launched_by(os.environ) is not None:
        raise JobError("lm-eval starts its ranks by itself, without mpiexec: --model_args model=...,ranks=4.")
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
    from mpillm.run import hosts
    from mpillm.tools import doctor

    found = doctor.examine(world, options.model)
    if world.rank == 0:
        print("\n".join(found.lines()), flush=True)
        if options.output is not None:
            hosts.write(options.output, found.hosts)
            print(f"{options.output} is written; mpillm plan --hosts {options.output} reads it.", flush=True)
    return world.bcast(found.exit_code)


def _spec(world: World, options: argparse.Namespace) -> Spec:
    """The job as rank 0 reads it, on every rank."""
    return world.on_rank_0(lambda: _load(options))


def _load(options: argparse.Namespace) -> Spec:
    from mpillm import spec

    job = getattr(options, "job", None)
    if job is not None and job.suffix in NO_JOBS:
        raise JobError(f"{job} is no job file (TOML); to run its requests, type --input {job}.")
    return spec.load(
        _job_file(options),
        getattr(options, "set", ()),
        model=getattr(options, "model", None),
        input=getattr(options, "input", None),
        output=getattr(options, "output", None),
    )


def _job_of(words: list[str]) -> Spec:
    """The job that a command line names."""
    return _load(command_parser().parse_args(words))


class _Parser(argparse.ArgumentParser):
    """Knows that a key of the job may have been meant where an option is unknown."""

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        options, unknown = self.parse_known_args(words)
        for word in unknown:
            name, equals, value = word.removeprefix("--").partition("=")
            following = words[words.index(word) + 1 :]
            value = value if equals or not following else following[0]
            if word.startswith("--") and (key := _key_called(name)):
                self.error(f"there is no option --{name}; type --set {key}={value or 'VALUE'}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options


def _key_called(option: str) -> str | None:
    from mpillm import spec

    return spec.key_called(option.replace("-", "_"))


def command_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="mpillm",
        description="Batches of LLM requests on CPUs, over MPI.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpillm {mpillm.__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="say more, on all ranks; twice: for debugging"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="run a job: a file of requests becomes a directory of answers")
    _job_arguments(run)
    run.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write what each rank did when, as JSON that ui.perfetto.dev opens",
    )
    plan = commands.add_parser("plan", help="will it fit, what will it cost, which layout")
    _job_arguments(plan)
    plan.add_argument(
        "--ranks", type=_positive, metavar="N", help="how many ranks it will run on (1, or all of --hosts)"
    )
    plan.add_argument(
        "--hosts", type=Path, metavar="FILE", help="hosts.toml: on which hosts, and what memory they have"
    )
    plan.add_argument(
        "--ranks-per-host",
        type=_positive,
        default=1,
        metavar="N",
        help="without --hosts: ranks on each host (1)",
    )
    plan.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="without --hosts: free on each, such as 8GiB (as much as here)",
    )
    plan.add_argument(
        "--suggest", type=float, metavar="RATE", help="print a job with the least memory for so many tokens/s"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    pack = commands.add_parser(
        "pack", help="store a model kernel-ready, for machines that it does not fit into"
    )
    pack.add_argument("source", metavar="SRC", help="catalogue name, Hugging Face directory or GGUF file")
    pack.add_argument("target", metavar="DST", type=Path, help="a new directory, or one to finish")
    pack.add_argument(
        "--weights",
        choices=("source", "q4_0", "q8_0", "bf16", "f32"),
        default="source",
        help="what matrices are stored as (as they are)",
    )
    commands.add_parser("models", help="list the models of the catalogue, with what they take")
    pull = commands.add_parser("pull", help="fetch a model of the catalogue, or hf:owner/name")
    pull.add_argument("name", help="such as smollm2-135m")
    init = commands.add_parser("init", help="write job files, hostfiles or Slurm scripts to start from")
    init.add_argument("what", choices=("job", "hostfile", "slurm"))
    init.add_argument("directory", type=Path)
    report = commands.add_parser("report", help="a finished run as one HTML page with plots")
    report.add_argument("directory", type=Path, help="the run's output directory")
    report.add_argument(
        "--figures", type=Path, metavar="DIR", help="write each plot there as well, as SVG, PDF and CSV"
    )
    export = commands.add_parser(
        "export", help="a finished run as a table: the input's rows, each with its answer"
    )
    export.add_argument("directory", type=Path, help="the run's output directory")
    export.add_argument("--format", choices=FORMATS, help="as the name of FILE ends, or csv")
    export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="instead of table.FORMAT in the directory"
    )
    export.add_argument("--input", type=Path, metavar="FILE", help="where the input is now, if it was moved")
    status = commands.add_parser("status", help="how far a run is, while it runs and after")
    status.add_argument("directory", type=Path, help="the run's output directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    watch = commands.add_parser("watch", help="how far a run is, again and again until it ends")
    watch.add_argument("directory", type=Path, help="the run's output directory")
    watch.add_argument("--every", type=_positive, default=5, metavar="SECONDS", help="between two lines (5)")
    compare = commands.add_parser("compare", help="what differs between the results of two runs")
    compare.add_argument("first", type=Path, help="a finished run's output directory")
    compare.add_argument("second", type=Path, help="another one's")
    merge = commands.add_parser("merge", help="the outputs of a job's parts become one")
    merge.add_argument(
        "parts",
        metavar="PART",
        nargs="+",
        type=Path,
        help="output directories of finished runs, or one directory that holds them",
    )
    merge.add_argument("--output", required=True, type=Path, help="directory for the merged results")
    serve.add_chat(commands.add_parser("chat", help="talk to a model in the terminal"))
    serve.add(commands.add_parser("serve", help="OpenAI's HTTP interface and a web page in front of a model"))
    doctor = commands.add_parser(
        "doctor", help="look at MPI, threads, kernels, the model file, network and disk"
    )
    doctor.add_argument("--model", default=None, help="a model that every rank must be able to read")
    doctor.add_argument(
        "--output", type=Path, metavar="FILE", help="write what was measured there, for plan --hosts"
    )
    supervise.add(
        commands.add_parser(
            "launch", help="mpiexec with a supervisor: starts again after failures, and grows"
        )
    )
    # What follows is the harness's, whose options are no options here.
    lm_eval = commands.add_parser(
        "lm-eval", help="lm-evaluation-harness on a model", prefix_chars="\0", add_help=False
    )
    lm_eval.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="as for lm_eval")
    bench.add(
        commands.add_parser(
            "bench", help="tokens/s, bytes per token and kernels, beside the machine's limits"
        )
    )
    ranks = commands.add_parser("ranks")  # of `mpillm.LLM`, which alone uses it: no help
    ranks.add_argument("address", metavar="SOCKET")
    ranks.add_argument("-n", type=_positive, default=1)
    return parser


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", type=Path, help="a job file (TOML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the job"
    )
    parser.add_argument("--model", help="catalogue name, Hugging Face directory or GGUF file")
    parser.add_argument(
        "--input",
        help="requests: JSON lines, an array, CSV, TSV, Parquet; - for stdin",
    )
    parser.add_argument("--output", help="directory for the results")


def _size(text: str) -> int:
    from mpillm.spec import byte_size

    try:
        return byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _job_file(options: argparse.Namespace) -> Path | None:
    """The job file that the command line names, or the quickstart if it names nothing at all."""
    job: Path | None = getattr(options, "job", None)
    if job is not None or any(getattr(options, name, None) for name in ("model", "input", "output", "set")):
        return job
    from mpillm.tools.init import shipped

    return shipped("jobs") / QUICKSTART
