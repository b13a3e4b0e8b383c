"""The words that each command takes, as argparse has them; what the commands do is in `commands`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm import version
from mpillm.cli import bench, serve, supervise
from mpillm.cli.parser import CommandParser, positive

if TYPE_CHECKING:
    from mpillm.spec import TableFormat

FORMATS: tuple[TableFormat, ...] = ("csv", "parquet", "jsonl")
EXAMPLES = """\
examples:
  mpillm launch -n 2 run           the quickstart job on the default small model
  mpiexec -n 4 python -m mpillm run jobs/summaries.toml --set sampling.seed=3
  mpiexec -n 4 python -m mpillm run --input requests.jsonl --output out/mine
  python -m mpillm plan jobs/large-model.toml --ranks 4

exit codes: 0 all done, 1 done but some requests ended in an error,
2 the job or the command is wrong, 75 interrupted (run the same command again
to continue), 70 a bug in mpillm"""


Add = Callable[..., argparse.ArgumentParser]  # adds a command
LEAST_MEMORY = 2**20  # bytes that a machine has: less was meant in another unit


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog="mpillm",
        description="Batches of LLM requests on CPUs, over MPI.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpillm {version.__version__}")
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="log more, on all ranks; give it twice for debugging",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = commands.add_parser
    _add_jobs(add)
    _add_models(add)
    _add_results(add)
    serve.add_chat(add("chat", help="chat with a model in the terminal"))
    serve.add(add("serve", help="serve a model by OpenAI's HTTP interface, with a web page"))
    doctor = add("doctor", help="check MPI, threads, kernels, the model file, network and disk")
    doctor.add_argument("--model", default=None, help="a model that every rank must be able to read")
    doctor.add_argument(
        "-o",
        "--output",
        type=_file,
        metavar="FILE",
        help="write the measurements to this file, for plan --hosts",
    )
    supervise.add(add("launch", help="start ranks, and start them again after a failure"))
    # What follows is the harness's, whose options are no options here.
    lm_eval = add("lm-eval", help="run lm-evaluation-harness on a model", prefix_chars="\0", add_help=False)
    lm_eval.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="as for lm_eval")
    bench.add(add("bench", help="measure speed, and compare it with the machine's limits"))
    ranks = add("ranks")  # only `mpillm.LLM` uses this command, so it has no help
    ranks.add_argument("address", metavar="SOCKET")
    ranks.add_argument("-n", type=positive, default=1)
    return parser


def _add_jobs(add: Add) -> None:
    run = add("run", help="run a job: read a file of requests, write a directory of answers")
    _job_arguments(run)
    run.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace of all ranks, as JSON for ui.perfetto.dev",
    )
    plan = add("plan", help="predict the memory, time and layout of a job")
    _job_arguments(plan)
    plan.add_argument("--ranks", type=positive, metavar="N", help="number of ranks (1, or all of --hosts)")
    plan.add_argument(
        "--hosts",
        type=Path,
        metavar="FILE",
        help="hosts.toml: the hosts and their memory, as doctor --output writes it",
    )
    plan.add_argument(
        "--ranks-per-host",
        type=positive,
        metavar="N",
        help="without --hosts: ranks on each host (1)",
    )
    plan.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="without --hosts: free memory of each host, such as 8GiB (that of this host)",
    )
    plan.add_argument(
        "--suggest",
        type=_rate,
        metavar="RATE",
        help="print a job file with the least memory that reaches this rate",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_models(add: Add) -> None:
    pack = add("pack", help="store a model in the kernels' format, which starts and streams faster")
    pack.add_argument("source", metavar="SRC", help="catalogue name, Hugging Face directory or GGUF file")
    pack.add_argument(
        "target", metavar="DST", type=Path, help="directory to write; an interrupted pack is completed"
    )
    pack.add_argument(
        "--weights",
        choices=("source", "q4_0", "q8_0", "w8a8", "bf16", "bf12", "f32"),
        default="source",
        help="block type of the stored matrices (that of the source)",
    )
    worker = add("worker", help="serve a root of Distributed-Llama as a worker")
    worker.add_argument("--host", default="0.0.0.0", help="the address that the root connects to (all)")
    worker.add_argument("--port", type=positive, default=9990, help="port to listen on (9990)")
    worker.add_argument("--nthreads", type=positive, default=1, metavar="N", help="threads (1)")
    models = add("models", help="list the models that pull knows by name, with licences, sizes and memory")
    models.add_argument(
        "--architectures", action="store_true", help="list all supported architectures instead"
    )
    pull = add("pull", help="fetch a model of the catalogue, or hf:owner/name")
    pull.add_argument("name", help="such as smollm2-135m")
    init = add("init", help="write job files, hostfiles, Slurm scripts or the documentation")
    init.add_argument("what", choices=("job", "hostfile", "slurm", "docs"))
    init.add_argument("directory", type=Path)


def _add_results(add: Add) -> None:
    report = add("report", help="make an HTML page with plots of a finished run")
    report.add_argument("directory", type=Path, help="the run's output directory")
    report.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also write each plot to this directory, as SVG, PDF and CSV",
    )
    export = add("export", help="make a table of a finished run: the input's rows, each with its answer")
    export.add_argument("directory", type=Path, help="the run's output directory")
    export.add_argument(
        "--format", choices=FORMATS, help="format of the table (by the ending of FILE, or csv)"
    )
    export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file to write (table.FORMAT in the directory)"
    )
    export.add_argument(
        "-i", "--input", type=Path, metavar="FILE", help="path of the input, if it was moved after the run"
    )
    status = add("status", help="show the progress of a run, while it runs or after")
    status.add_argument("directory", type=Path, help="the run's output directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    watch = add("watch", help="show the progress of a run every few seconds until it ends")
    watch.add_argument("directory", type=Path, help="the run's output directory")
    watch.add_argument(
        "--every", type=positive, default=5, metavar="SECONDS", help="time between two lines (5)"
    )
    compare = add("compare", help="show what differs between the results of two runs")
    compare.add_argument("first", type=Path, help="a finished run's output directory")
    compare.add_argument("second", type=Path, help="another finished run's output directory")
    merge = add("merge", help="merge the outputs of a job's parts into one")
    merge.add_argument(
        "parts",
        metavar="PART",
        nargs="+",
        type=Path,
        help="output directories of finished runs, or one directory that contains them",
    )
    merge.add_argument("-o", "--output", required=True, type=Path, help="directory for the merged results")


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", type=Path, help="a job file (TOML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the job"
    )
    parser.add_argument("--model", help="catalogue name, Hugging Face directory or GGUF file")
    parser.add_argument(
        "-i",
        "--input",
        help="requests: JSON lines, an array, CSV, TSV, Parquet; - for stdin",
    )
    parser.add_argument("-o", "--output", help="directory for the results")


def _file(text: str) -> Path:
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory; give a file")
    return path


def _size(text: str) -> int:
    from mpillm.spec import byte_size

    try:
        found = byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found < LEAST_MEMORY:
        meant = f"did you mean {text}GiB?" if text.isdecimal() else "write MiB or GiB"
        raise argparse.ArgumentTypeError(f"{text} is too little memory for a rank; {meant}")
    return found


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write tokens/s as a number above 0")
    return rate
