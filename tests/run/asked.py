"""Lines that take memory, each kind in its own way."""

from __future__ import annotations

import random
from typing import Any

from tests.e2e.jobs import WORDS

VOCAB = 16_000
LONG = 8 * 2**20 - 4096  # bytes of a long line: nearly as many as one may have


def ids(
    draw: random.Random, count: int, length: int, vocab: int = VOCAB, **more: Any
) -> list[dict[str, Any]]:
    """Prompts of token ids."""
    prompts = ([draw.randrange(5, vocab) for _ in range(length)] for _ in range(count))
    return [{"prompt": prompt, "max_tokens": 3, "ignore_eos": True, **more} for prompt in prompts]


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def chats(draw: random.Random, count: int, length: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": words(draw, length)}], "max_tokens": 4}
        for _ in range(count)
    ]


def long_lines(draw: random.Random) -> list[dict[str, Any]]:
    """Each as long as a line may be; most ask for too much, and some only hold what nobody reads."""
    text = words(draw, LONG // 4)[:LONG]
    return [
        {"prompt": text},
        {"prompt": "a" * (LONG - 8) + "\N{GRINNING FACE}"},
        {"prompt": [draw.randrange(300) for _ in range(LONG // 5)]},
        {"prompt": [words(draw, 500) for _ in range(2000)], "max_tokens": 1},
        {"messages": [{"role": "user", "content": "a"}] * (LONG // 40)},
        {"prompt": "a", "max_tokens": 2, "metadata": [[]] * (LONG // 4)},
        {"prompt": "a", "max_tokens": 2, "metadata": {str(n): 0.5 for n in range(LONG // 13)}},
        {"input": [[draw.randrange(300) for _ in range(100)] for _ in range(500)]},
    ]


def named(draw: random.Random) -> list[dict[str, Any]]:
    """Names as long as they may be, with characters that take four bytes each."""
    names = (f"{number} \N{GRINNING FACE}".ljust(4000, draw.choice("abc")) for number in range(1500))
    return [{"custom_id": name, "prompt": [5], "max_tokens": 1} for name in names]


def held(draw: random.Random) -> list[dict[str, Any]]:
    """Each answer is held to another schema, some of which take much memory for their length."""
    size = 1500
    deep = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(size)} | {f"d{size}": {"type": "string"}}
    schemas: list[dict[str, Any]] = [
        {"enum": [f"{word} {number}" for number in range(300)]} for word in draw.sample(WORDS, 8)
    ]
    schemas += [{"type": "integer", "multipleOf": draw.choice((9973, 9967, 9949))}]
    schemas += [{"$defs": deep, "$ref": "#/$defs/d0"}]
    return [{"prompt": "a", "max_tokens": 6, "structured_outputs": {"json": schema}} for schema in schemas]


def labelled(draw: random.Random) -> list[dict[str, Any]]:
    texts = [[one["prompt"] for one in ids(draw, 50, 60, vocab=90)] for _ in range(20)]
    return [{"url": "/v1/classify", "body": {"input": text}} for text in texts]


def paired(draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "url": "/v1/rerank",
            "body": {"query": words(draw, 5), "documents": [words(draw, 30) for _ in range(50)]},
        }
        for _ in range(20)
    ]


def scored(draw: random.Random) -> list[dict[str, Any]]:
    return [
        {"url": "/v1/multiple_choice", "body": {"prompt": words(draw, 60), "choices": draw.sample(WORDS, 9)}}
        for _ in range(60)
    ]


def tuned(draw: random.Random) -> list[dict[str, Any]]:
    """Chats that repeat themselves, so that drafts are made, half of them for an adapter."""
    lines = [one | {"max_tokens": 60} for one in chats(draw, 30, 60)]
    return [one | {"model": "tuned"} if number % 2 else one for number, one in enumerate(lines)]
