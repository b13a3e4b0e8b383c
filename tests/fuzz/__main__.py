"""`python -m tests.fuzz gguf --cases 1000000 --seed S`: a reader fed with damaged bytes for as long as one likes.

With atheris (`pip install atheris`) what is tried follows what the code does with it; without it, cases are drawn by
a plain mutator. A finding is written to a file and shown; so is a case that takes too long, or too much memory.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.mutate import cases

LONGEST = 10  # seconds of processor time for a case, so that a busy machine makes no finding
WAIT = 600  # seconds for a case that computes nothing: it waits for something that never comes
MEMORY = 2048  # MiB for the process


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="what to feed; `list` names them")
    parser.add_argument("--cases", type=int, default=100_000, metavar="N", help="how many (100000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (1)")
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what atheris found worth keeping")
    parser.add_argument("--plain", action="store_true", help="the plain mutator, also where there is atheris")
    parser.add_argument("--case", type=Path, help="feed this file alone")
    options = parser.parse_args()
    with contextlib.suppress(ImportError):
        if not options.plain and not options.case and options.target != "list":
            import atheris

            with atheris.instrument_imports(include=["mpillm"]):
                targets = importlib.import_module("tests.fuzz.targets")
            return _with_atheris(atheris, targets, options)
    targets = importlib.import_module("tests.fuzz.targets")
    if options.target == "list":
        print(*targets.TARGETS)
        return None
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY << 20, MEMORY << 20))
    with targets.make(options.target) as target:
        if options.case:
            return target.run(options.case.read_bytes())
        begun = time.monotonic()
        finding = Path(f"finding-{options.target}-{options.seed}")
        for case in cases(target.seeds, target.words, options.cases, options.seed):
            finding.write_bytes(case)  # before, for a case may end the process
            with limited():
                target.run(case)
        finding.unlink(missing_ok=True)
        spent = time.monotonic() - begun
        print(f"{options.target}: {options.cases} cases, seed {options.seed}, {spent:.0f} s, no finding")


@contextlib.contextmanager
def limited(longest: float = LONGEST, wait: float = WAIT) -> Iterator[None]:
    """End the process, with the stacks of its threads on stderr, if a case takes too long."""
    faulthandler.register(signal.SIGPROF, chain=True)  # the default action follows, also inside of a library
    faulthandler.dump_traceback_later(wait, exit=True)
    signal.setitimer(signal.ITIMER_PROF, longest)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _with_atheris(atheris, targets, options: argparse.Namespace) -> None:  # type: ignore[no-untyped-def]
    with targets.make(options.target) as target, tempfile.TemporaryDirectory() as folder:
        corpus = options.corpus or Path(folder) / "corpus"
        corpus.mkdir(exist_ok=True, parents=True)
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        words = Path(folder) / "words"
        escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        longest = 2 * max(map(len, target.seeds)) + 4096
        flags = [
            f"-runs={options.cases}",
            f"-seed={options.seed}",
            f"-timeout={WAIT}",
            f"-rss_limit_mb={MEMORY}",
        ]
        flags += [f"-max_len={longest}", f"-artifact_prefix=finding-{options.target}-"]
        flags += ["-print_final_stats=1", *([f"-dict={words}"] if target.words else [])]

        def run(data: bytes) -> None:
            with limited():
                target.run(data)

        atheris.Setup([sys.argv[0], *flags, str(corpus)], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
