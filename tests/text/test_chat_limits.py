"""Chat templates that want too much: memory, time, depth, files; and processes of templates that end."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpillm.errors import Interrupted, RequestError
from mpillm.text import TooLongError
from tests.conftest import run_bounded
from tests.text.asked import controls, render_chat
from tests.text.chats import Make, named, user


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only two turns') }}", "refuses these messages: only two turns"),
        ("{{ messages[7].content + 1 }}", "refuses these messages: list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for x in %}", "is not valid: "),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_may_not_do(make: Make, template: str, words: str) -> None:
    with pytest.raises(RequestError, match=rf"The model's chat template .*{words}"):
        make(template).encode_chat(user("x"))


DOUBLING = "{% set ns = namespace(x=[1]) %}{% for n in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1000000000000 }}",
        "{{ [1] * 1000000000000 }}",
        "{{ '%010000000000d' % 1 }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ messages[0].content.ljust(10000000000) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ ('a' * 10000000) | replace('a', 'b' * 1000) }}",
        "{% set ns = namespace(x='ab') %}{% for n in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_wants_too_much_memory(make: Make, template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"refuses these messages: it takes more than 1 GiB of memory$"):
        make(template).encode_chat(user("x"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_template_that_says_too_much(make: Make) -> None:
    template = "{% for a in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}"
    with pytest.raises(RequestError, match="more than 16777216 characters"):
        make(template).encode_chat(user("x"))


ENDLESS = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}" + "{% endfor %}" * 3


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpillm.text.confined.MAX_SECONDS", 0.3)
    monkeypatch.setattr("mpillm.text.confined.MAX_DEATHS", 2)


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10 ** (10 ** 10) }}", DOUBLING + "{{ ns.x | tojson }}"])
def test_a_template_that_does_not_end(make: Make, template: str, quick: None) -> None:
    """It is told so each time, until it has had its chances; other templates are not touched by it."""
    tokenizer = make(template)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"refuses these messages: it takes more than 0\.3 seconds$"):
            tokenizer.encode_chat(user("x"))
    for _ in range(2):
        with pytest.raises(
            RequestError, match=r"was stopped 3 times, for a plain chat too; it is not tried again$"
        ):
            tokenizer.encode_chat(user("x"))
    assert render_chat(make("{{ messages[0].content }}"), user("x")) == "x"


def test_what_ends_the_template_counts_against_its_chat(make: Make, quick: None) -> None:
    """However many such chats come first, and one after the other."""
    tokenizer = make(
        "{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    )
    for count in (1, 3):
        for _ in range(count):
            with pytest.raises(RequestError, match=r"takes more than 0\.3 seconds$"):
                tokenizer.encode_chat(user("loop"))
        assert render_chat(tokenizer, user("x")) == "x"


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"k": value} if depth % 2 else [value]
    return value


@pytest.mark.parametrize("depth", [100, 101, 500, 501, 20_000])
def test_deep_chats(make: Make, depth: int) -> None:
    tokenizer = named(make, "chatml")
    deep = nested(depth)
    for messages, options in (
        ([{"role": "user", "content": "x", "k": deep}], {}),
        (user("x"), {"tools": [deep]}),
        (user("x"), {"k": deep}),
    ):
        with pytest.raises(RequestError, match="nested more than 64 levels deep"):
            tokenizer.encode_chat(messages, options)
    assert tokenizer.encode_chat(
        [{"role": "user", "content": "x", "k": nested(30)}]
    ) == tokenizer.encode_chat(user("x"))


def test_chats_of_too_many_values(make: Make) -> None:
    with pytest.raises(RequestError, match="hold more than 1048576 values"):
        named(make, "chatml").encode_chat([{"role": "user", "content": "x", "k": [1] * 2_000_000}])


@pytest.mark.parametrize("text", ["<" * 6_000_000, "<|im_end|>" * 300_000])
def test_megabytes_of_angle_brackets(make: Make, text: str) -> None:
    """No text that fits into a context takes so long that its process is ended."""
    tokenizer = named(make, "qwen3")
    with pytest.raises(TooLongError, match=r"more than \d+ characters"):
        tokenizer.encode_chat(user(text), max_tokens=4096)
    pieces = tokenizer._chats.chosen({}).pieces(user(text))
    assert "".join(piece for piece, _ in pieces) if isinstance(pieces, list) else pieces


@pytest.mark.parametrize("content", ["x" * 100, "x"])
def test_a_template_that_makes_much_of_little(make: Make, content: str) -> None:
    tokenizer = make("{{ messages[0].content }}{% for a in range(15) %}{{ 'y ' * 500000 }}{% endfor %}")
    with pytest.raises(TooLongError, match=r"more than \d+ (tokens|characters)"):
        tokenizer.encode_chat(user(content), max_tokens=512)


def template_process() -> psutil.Process:
    below = psutil.Process().children()
    (found,) = [one for one in below if "mpillm.text.template_child" in " ".join(one.cmdline())]
    return found


def test_a_template_whose_process_is_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make("{{ messages[0].content }}!")
    assert render_chat(tokenizer, user("x")) == "x!"
    monkeypatch.setattr("mpillm.text.confined.MAX_WAIT", 0.2)
    child = template_process()
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(RequestError, match=r"more than 0\.2 seconds"):
        render_chat(tokenizer, user("x"))
    monkeypatch.undo()
    assert not child.is_running()
    assert render_chat(tokenizer, user("y")) == "y!"


def test_a_template_whose_process_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the template's doing: it is asked again, and no request is to blame if that does not help."""
    tokenizer = make("{{ messages[0].content }}!")
    assert render_chat(tokenizer, user("x")) == "x!"
    template_process().kill()
    assert render_chat(tokenizer, user("y")) == "y!"
    monkeypatch.setattr("mpillm.text.confined.MAX_KILLS", 1)
    template_process().kill()
    with pytest.raises(RequestError, match=r"its process was killed 1 times \(by the kernel"):
        render_chat(tokenizer, user("x"))
    assert render_chat(tokenizer, user("z")) == "z!"
    monkeypatch.setattr("mpillm.text.confined._CHILD", "import os; os.kill(os.getpid(), 9)")
    template_process().kill()
    with pytest.raises(Interrupted) as caught:
        render_chat(tokenizer, user("x"))
    assert str(caught.value) == (
        "The process that applies the model's chat template was killed 1 times (by the kernel, for lack of "
        "memory?); run the same command again to continue."
    )


def test_a_template_can_write_no_file(tmp_path: Path) -> None:
    """Should a template ever get out of Jinja's sandbox, it is in a process that writes no files."""
    words = ["from mpillm.text.template_child import confine", "import pathlib, sys", "confine()"]
    script = "; ".join([*words, "pathlib.Path(sys.argv[1]).write_text('x')"])
    done = run_bounded([sys.executable, "-c", script, tmp_path / "file"])
    assert "File too large" in done.stderr
    assert (tmp_path / "file").read_text() == ""


def test_long_chats_are_quick(make: Make) -> None:
    tokenizer = named(make, "qwen3")
    text = json.dumps({"a": ["<|im_end|> <b> [x] word"] * 4000})
    assert len(controls(tokenizer, tokenizer.encode_chat(user(text)))) == 3
