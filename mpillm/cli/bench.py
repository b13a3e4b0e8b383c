"""`mpillm bench` on the command line."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from mpillm.cli.console import Console
from mpillm.comm.world import World

WHAT = ("kernels", "prefill", "decode", "batch", "startup")
MORE = ("paging", "speculation")  # only on request, because they take long


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="smollm2-135m", help="catalogue name or GGUF file (smollm2-135m)")
    model.add_argument(
        "--synthetic",
        metavar="SHAPE",
        help="a random-weight model instead: llama-1b, llama-8b, llama-70b, qwen3-30b-a3b, gpt-oss-20b, "
        "gpt-oss-120b, deepseek-v3, glm-4.5-air, qwen3.6-35b-a3b, gemma-3-27b; NAME:N has only the first "
        "N layers",
    )
    parser.add_argument(
        "--weights",
        help="block type of the synthetic model's weights: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, "
        "iq4_nl, iq4_xs, mxfp4, q4_k_m, q5_k_m, w8a8, bf16, f16 or f32 (q4_0)",
    )
    parser.add_argument(
        "--what",
        type=_words,
        default=WHAT,
        help=f"measurements, some of {','.join(WHAT)} (all of these), or {', '.join(MORE)}",
    )
    for name, default, meaning in (
        ("threads", (), "threads of each rank (its share of the node)"),
        (
            "sequences",
            (1, 8, 32, 128),
            "numbers of sequences that decode together (1,8,32,128); 1 is decode, more is batch",
        ),
        ("prompt", (512,), "tokens of a prompt in prefill (512)"),
        ("context", (16,), "tokens of each sequence before its first decoded one (16)"),
    ):
        parser.add_argument(f"--{name}", type=_numbers, default=default, metavar="N[,N...]", help=meaning)
    parser.add_argument(
        "--budget", type=_budgets, default=(), metavar="B[,B...]",
        help="memory for the weights of a rank in paging (25%%) and speculation (all): a "
        "percentage of its share, or a size such as 4GiB",
    )  # fmt: skip
    parser.add_argument("--draft", metavar="MODEL", help="draft model for speculation")
    parser.add_argument(
        "--repeats",
        type=_number,
        default=5,
        metavar="N",
        help="number of measurements, of which the median is shown (5)",
    )
    parser.add_argument(
        "--against",
        metavar="PEER",
        help="compare with another program on the same file, in turns: llama.cpp, or NAME=PATH of a "
        "llama-batched-bench (such as ik_llama.cpp's)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")


def run(world: World, options: argparse.Namespace) -> int:
    """Measure and print."""
    from mpillm.bench import suite, tables  # what computes is loaded when the threads are known
    from mpillm.bench.runs import BenchOptions

    with world.together():
        if world.rank == 0 and options.json is not None:
            _write(options.json, "")  # find out before the bench whether it can be written
    measured = BenchOptions(
        what=frozenset(options.what),
        threads=options.threads,
        sequences=options.sequences,
        prompts=options.prompt,
        contexts=options.context,
        budgets=options.budget,
        repeats=options.repeats,
        draft=options.draft,
    )
    asked = suite.BenchCommand(options.model, options.synthetic, options.weights, options.against, measured)
    made = suite.bench(world, asked, Console(lambda: world.rank == 0))
    if made is None:
        return 0
    print(tables.as_text(made), flush=True)
    if options.json is not None:
        _write(options.json, tables.as_json(made) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    from mpillm.store.directory import replacing

    with replacing(path) as file:
        file.write(text.encode())


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    for word in words:
        if word not in WHAT + MORE:
            close = difflib.get_close_matches(word.lower(), WHAT + MORE, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(WHAT + MORE)}{meant}")
    return words


def _budgets(text: str) -> tuple[str, ...]:
    from mpillm.spec import byte_size

    words = tuple(text.split(","))
    for word in words:
        try:
            good = float(word[:-1]) > 0 if word.endswith("%") else byte_size(word) > 0
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{word!r} is neither a percentage nor a size such as 4GiB")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(word) for word in text.split(","))


def _number(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number
