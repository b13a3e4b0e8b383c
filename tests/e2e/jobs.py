"""Small jobs on the tiny chat model, for tests that run the whole program."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import Mpi
from tests.model.golden import model_path

CHAT = model_path("chat")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
]


def mixed_lines(count: int, seed: int = 0, tokens: int = 12) -> list[dict[str, Any]]:
    """Requests of every kind: chats, greedy and drawn completions, several choices, scoring, embeddings."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": draw.randint(1, tokens)}
        drawn = {
            "prompt": text,
            "max_tokens": draw.randint(1, tokens),
            "temperature": 1.1,
            "n": draw.randint(1, 2),
        }
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", chat),
            ("/v1/completions", {**drawn, "top_p": 0.95, "logprobs": 2}),
            ("/v1/completions", {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}),
            ("/v1/embeddings", {"input": text}),
        ]
        url, body = kinds[number % len(kinds)]
        lines.append({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(source: Path, output: Path, *settings: str, model: Path = CHAT) -> list[str]:
    """The arguments of python for a run."""
    words = ["-m", "mpillm", "run", "--model", model, "--input", source, "--output", output]
    return [*map(str, words), *(w for one in settings for w in ("--set", one))]


def run(
    mpi: Mpi, ranks: int, source: Path, output: Path, *settings: str, model: Path = CHAT, **env: str
) -> subprocess.CompletedProcess[str]:
    return mpi.run(ranks, *command(source, output, *settings, model=model), env=env)


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, and one line that has the words; never a traceback. (mpiexec adds a notice of its own.)"""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mpillm: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in said[0]
