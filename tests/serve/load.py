"""Many clients at once, half of which vanish: `python -m tests.serve.load` measures a server beside the same batch.

It serves a model of the catalogue, asks it by 64 clients with requests of mixed lengths, and runs the same requests
as a batch, in turns. A line of each round says how fast the server was, of 1 as fast as the batch. `--against URL` asks
another server in each round, too: any that speaks OpenAI's API, such as llama-server with the same model and threads
(`llama-server -m MODEL.gguf -t THREADS -np CLIENTS -c CONTEXT`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from tests.conftest import clean_environment, run_bounded
from tests.serve.serving import serving

WORDS = ["the", "a", "of", "quick", "brown", "fox", "lazy", "dog", "jumps", "over", "seven", "why", "how"]


def mixed_bodies(count: int, tokens: int, words: int, seed: int = 0) -> list[dict[str, Any]]:
    """Completions with prompts of up to `words` words and answers of up to `tokens` tokens."""
    draw = random.Random(seed)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, words))),
            "max_tokens": draw.randint(1, tokens),
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


def text_of(client: openai.OpenAI, body: dict[str, Any], streamed: bool) -> str:
    """The answer to a body."""
    asked = dict(body)
    more = {"ignore_eos": asked.pop("ignore_eos")}
    if not streamed:
        return client.completions.create(model=None, extra_body=more, **asked).choices[0].text
    with client.completions.create(model=None, extra_body=more, stream=True, **asked) as stream:
        return "".join(chunk.choices[0].text for chunk in stream)


def vanish(client: openai.OpenAI, body: dict[str, Any], early: bool) -> None:
    """Ask, and go: while the request waits or is computed, or after the first piece of a long answer."""
    longer = {**body, "max_tokens": 300}
    if early:
        try:
            text_of(client.with_options(timeout=0.05), longer, streamed=False)
        except openai.APITimeoutError:
            return
        return
    more = {"ignore_eos": longer.pop("ignore_eos")}
    with client.completions.create(model=None, extra_body=more, stream=True, **longer) as stream:
        next(iter(stream))


def ask_all(client: openai.OpenAI, bodies: list[dict[str, Any]], half_vanish: bool) -> list[str | None]:
    """What clients that ask at once get, one for each body; None of those that went, every second one."""

    def ask(index: int) -> str | None:
        if half_vanish and index % 2:
            vanish(client, bodies[index], early=index % 4 == 1)
            return None
        return text_of(client, bodies[index], streamed=index % 4 == 2)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, range(len(bodies))))


def measure_other(client: openai.OpenAI, bodies: list[dict[str, Any]]) -> float:
    """Tokens per second that another server generates for the bodies, counted by its own usage."""

    model = client.models.list().data[0].id

    def ask(body: dict[str, Any]) -> int:
        asked = {**body, "temperature": 0}
        more = {"ignore_eos": asked.pop("ignore_eos")}
        done = client.completions.create(model=model, extra_body=more, **asked)
        assert done.usage is not None, "the other server counts no tokens"
        return done.usage.completion_tokens

    begun = time.monotonic()
    with ThreadPoolExecutor(len(bodies)) as pool:
        tokens = sum(pool.map(ask, bodies))
    return tokens / (time.monotonic() - begun)


def wait_until_idle(client: openai.OpenAI, server: str) -> None:
    """Wait until nothing runs; a server that still computes for clients that went fails after a minute."""
    until = time.monotonic() + 60
    while (state := client._client.get(f"{server}/health").json())["running"]:
        assert time.monotonic() < until, state
        time.sleep(0.05)


def batch(folder: Path, model: str | Path, bodies: list[dict[str, Any]]) -> tuple[list[str], float]:
    """The texts of a run, and its seconds of computing."""
    source = folder / "in.jsonl"
    source.write_text("".join(f"{json.dumps(body)}\n" for body in bodies))
    words = ["--model", model, "--input", source, "--output", folder / "out"]
    done = run_bounded([sys.executable, "-m", "mpillm", "run", *words], 600, clean_environment())
    assert done.returncode == 0, done.stderr
    lines = (folder / "out/results.jsonl").read_text().splitlines()
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in lines]
    return texts, json.loads((folder / "out/report.json").read_text())["phases"]["compute"]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="of the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", metavar="URL", help="another server, such as http://127.0.0.1:8080")
    options = parser.parse_args()
    ratios, others = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serving(folder, [sys.executable], clean_environment(), model=options.model) as (url, _),
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client,
        ):
            for turn in range(options.rounds):
                # Other prompts in each round: the server keeps those of earlier ones in its KV cache.
                bodies = mixed_bodies(options.clients, options.tokens, words=120, seed=turn)
                tokens = sum(body["max_tokens"] for body in bodies)
                (folder / str(turn)).mkdir()
                texts, seconds = batch(folder / str(turn), options.model, bodies)
                begun = time.monotonic()
                assert ask_all(client, bodies, half_vanish=False) == texts
                spent = time.monotonic() - begun
                ratios.append(seconds / spent)
                print(
                    f"{tokens / seconds:.0f} tokens/s as a batch, {tokens / spent:.0f} served: {ratios[-1]:.2f}"
                )
                if options.against:
                    with openai.OpenAI(
                        base_url=f"{options.against.rstrip('/')}/v1",
                        api_key="none",
                        max_retries=0,
                        timeout=600,
                    ) as other:
                        speed = measure_other(other, bodies)
                    others.append(tokens / spent / speed)
                    print(
                        f"{speed:.0f} tokens/s by {options.against}: served {others[-1]:.2f} times as fast here"
                    )
                for found, text in zip(ask_all(client, bodies, half_vanish=True), texts, strict=True):
                    assert found in (None, text)
                wait_until_idle(client, url)
    print(f"{options.clients} clients, half of them vanishing: median {statistics.median(ratios):.2f}")
    if others:
        print(f"median {statistics.median(others):.2f} times as fast as {options.against}")


if __name__ == "__main__":
    main()
