"""Lines of an input that are drawn by a grammar: bodies of all endpoints, and what may be wrong with them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from mpillm.batch import other_keys
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.batch.work import Endpoint
from tests.fuzz.fields import CALLS, FIELDS, tool_calls

# Keys that mean something somewhere, and some that do not.
KEYS = sorted(
    {
        *other_keys.IGNORED,
        *other_keys.NEUTRAL,
        *other_keys.REFUSED,
        *(key for endpoint in ENDPOINTS for key in endpoint.__struct_fields__),
        *(
            "role",
            "content",
            "type",
            "text",
            "custom_id",
            "url",
            "body",
            "max_new_tokens",
            "",
            "k" * 300,
            "\0",
        ),
    }
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    20,
    21,
    1024,
    1025,
    4096,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.0,
    0.5,
    1.0,
    1e-9,
    1e308,
)
ROLES = ("user", "assistant", "system", "tool", "developer", "function", "ipython", "", "User", "\N{SNOWMAN}")
PIECES = (
    "the quick brown fox", " ", "\n", "a", "0", "<", "</s>", "<s>", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>",
    "[INST]", "caf\u00e9", "\u6f22\u5b57", "\U0001f600", "\u0301", "\ufdd0", "\uffff", "\0", "\x1b[2J", "{{ 7 * 7 }}",
    "{% for x in y %}", "\u200b", "\r", "\t", "'", '"', "\\", "<think>", "</think>", "\u2581", "word ",
)  # fmt: skip
HOLDING = (
    "structured_outputs",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
DEPTHS = (1, 3, 60, 70, 500, 20_000)
LENGTHS = (0, 1, 1, 2, 2, 3, 7, 7, 20, 60, 200)
LONG = (5_000, 100_000, 1_000_000)  # pieces of a text, or values of a list; seldom
MOST = 1_000_000  # of them in a line


class Draw:
    """Draws by the bytes of a case as long as there are any, so that a fuzzer can learn what they do."""

    def __init__(self, data: bytes) -> None:
        self.budget = MOST
        self._left = iter(data)
        self._random = random.Random(hashlib.blake2b(data).digest())

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        byte = next(self._left, None)
        return self._random.randrange(count) if byte is None or count > 256 else byte % count

    def one(self, values: Any) -> Any:
        """One of the values."""
        return values[self.below(len(values))]

    def often(self, percent: int) -> bool:
        """True so often."""
        return self.below(100) < percent


def line(draw: Draw, urls: Sequence[str]) -> bytes:
    """A line: a good one, most often for one of the `urls`, in which some things are then changed."""
    content = _content(draw, urls)
    for _ in range(draw.one((0, 0, 0, 0, 0, 1, 2, 5))):
        content = _changed(draw, content)
    raw = json.dumps(content, ensure_ascii=draw.often(50)).encode(errors="surrogatepass")
    if draw.often(5):
        at = draw.below(len(raw) + 1)
        raw = raw[:at] + draw.one((b"\xff", b"{", b'"', b"]", b"\\", b"NaN", b"\x00", b"1e999")) + raw[at:]
    return raw.replace(b"\n", b" ")


def _content(draw: Draw, urls: Sequence[str]) -> Any:
    endpoint = draw.one([one for one in ENDPOINTS if one.url in urls] if draw.often(90) else ENDPOINTS)
    names = endpoint.__struct_fields__
    body: dict[str, Any] = {name: _field(draw, name) for name in _main_keys(draw, endpoint)}
    wanted = [draw.one(names) for _ in range(draw.below(4))]
    if "structured_outputs" in names and draw.often(20):
        wanted.append(draw.one(HOLDING))
    if "tools" in names and draw.often(30):
        wanted += ["tools", "tool_choice"]
    for name in wanted:
        body.setdefault(name, _field(draw, name))
    if "top_logprobs" in body:
        body["logprobs"] = True
    if draw.often(10):
        body[draw.one(KEYS)] = _value(draw)
    if not endpoint.key or endpoint.key == "query" or draw.often(50):
        name = _text(draw) if draw.often(10) else f"r{draw.below(1000)}"
        url = draw.one((endpoint.url, *endpoint.aliases))
        return {"custom_id": name, "method": "POST", "url": url, "body": body}
    return body


def _main_keys(draw: Draw, endpoint: type[Endpoint]) -> tuple[str, ...]:
    """The keys without which there is no request."""
    match endpoint.url:
        case "/v1/multiple_choice":
            return "choices", draw.one(("prompt", "messages"))
        case "/v1/score":
            return draw.one(
                (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
            )
        case "/v1/rerank":
            return "query", "documents"
        case _:
            return (endpoint.key or "input",)


def _field(draw: Draw, name: str) -> Any:
    """A value for a key of an endpoint, most often one that is taken."""
    if name == "messages":
        return _messages(draw)
    if name in ("prompt", "input"):
        return _prompt(draw)
    return FIELDS[name](draw)


def _messages(draw: Draw) -> list[Any]:
    if draw.often(70):  # a conversation as templates want it
        roles = ["user", *["assistant", "user"] * draw.below(3)]
        return [_message(draw, role) for role in (["system", *roles] if draw.often(20) else roles)]
    many = draw.one((1, 1, 2, 3, 5)) if not draw.often(1) else draw.one(LENGTHS)
    return [_message(draw, draw.one(ROLES[:3] if draw.often(80) else ROLES)) for _ in range(many)]


def _message(draw: Draw, role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role}
    if draw.often(95):
        parts = [{"type": "text", "text": _text(draw)} for _ in range(draw.below(3))]
        message["content"] = _text(draw) if draw.often(75) else draw.one((parts, None, _value(draw)))
    if draw.often(5):
        message[draw.one((*KEYS, "tool_calls", "name", "reasoning_content"))] = _value(draw)
    if message["role"] == "assistant" and draw.often(20):
        message["tool_calls"] = tool_calls(draw)
    return message


def _prompt(draw: Draw) -> Any:
    if draw.often(50):
        return _text(draw)
    if draw.often(50):
        return _repeated(draw, lambda: draw.below(300))
    return _repeated(
        draw, lambda: _text(draw) if draw.often(50) else [draw.below(320) for _ in range(draw.below(20))]
    )


def _repeated(draw: Draw, one: Callable[[], Any]) -> list[Any]:
    """A list of values that begins anew after some of them, so that a long one is made quickly."""
    count = _many(draw)
    few = [one() for _ in range(min(count, 20))]
    return (few * (count // 20 + 1))[:count]


def _many(draw: Draw) -> int:
    count = min(draw.one(LONG) if draw.below(1000) == 999 else draw.one(LENGTHS), draw.budget)
    draw.budget -= count
    return int(count)


def _text(draw: Draw) -> str:
    count = _many(draw)
    if count > 60:
        return str(draw.one(PIECES)) * count
    return "".join(draw.one(PIECES) for _ in range(count)) + ("\ud800" if draw.below(200) == 199 else "")


def _value(draw: Draw, depth: int = 3) -> Any:
    kind = draw.below(9)
    if kind < 3 or not depth:
        return draw.one((None, True, False, *NUMBERS))
    if kind < 5:
        return _text(draw)
    if kind == 5:
        return _nested(draw)
    if kind == 6:
        return [draw.one(NUMBERS)] * _many(draw)
    if kind == 7:
        return [_value(draw, depth - 1) for _ in range(draw.below(4))]
    return {draw.one(KEYS): _value(draw, depth - 1) for _ in range(draw.below(4))}


def _nested(draw: Draw) -> Any:
    """Lists or objects in each other, no deeper than json can write them."""
    value: Any = 1
    for _ in range(min(draw.one(DEPTHS), 900)):
        value = [value] if draw.often(50) else {"a": value}
    return value


def answer(draw: Draw) -> str:
    """What a model may answer: text, and calls of tools that are whole, cut or no calls."""
    return "".join(draw.one(PIECES) if draw.often(50) else draw.one(CALLS) for _ in range(draw.below(9)))


def _changed(draw: Draw, content: Any) -> Any:
    """The content with one value in it replaced, removed or added."""
    if not isinstance(content, dict | list) or not content or draw.often(20):
        return _value(draw) if draw.often(30) else content
    if isinstance(content, list):
        at = draw.below(len(content))
        return [*content[:at], *([_changed(draw, content[at])] * draw.one((0, 1, 1, 2))), *content[at + 1 :]]
    key = draw.one(list(content))
    match draw.below(4):
        case 0:
            return {name: value for name, value in content.items() if name != key}
        case 1:
            return content | {draw.one(KEYS): _value(draw)}
        case _:
            return content | {key: _changed(draw, content[key])}
