"""What takes long can be interrupted: a signal's handler runs while it goes on, however long that would be."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from mpillm.text import confined, load_tokenizer
from mpillm.text.encode import CHUNK
from mpillm.text.interruptible import interruptible
from mpillm.text.tokenizer import Tokenizer
from tests.e2e.jobs import CHAT, WORDS
from tests.text.vocabularies import STYLES, write_directory


class Told(Exception):
    """The signal has come."""


@contextmanager
def signalled(once: Callable[[], object]) -> Iterator[None]:
    """The main thread gets a signal as soon as `once` has returned, in another thread."""

    def tell(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Told

    def wait() -> None:
        once()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, tell)
    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield
    finally:
        waiting.join()
        signal.signal(signal.SIGUSR1, before)


class Endless:
    """Stands for the tokenizers library, with texts that it takes for ever to encode."""

    encode_special_tokens = False

    def __init__(self) -> None:
        self.begun, self.never = threading.Event(), threading.Event()

    def encode(self, text: str, **_: Any) -> NoReturn:
        raise AssertionError(f"{len(text)} characters are encoded without a break")

    def encode_batch_fast(self, texts: list[str], **_: Any) -> None:
        self.begun.set()
        self.never.wait()


def test_a_text_that_is_encoded_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, endless = load_tokenizer(CHAT), Endless()
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer._encoder, "_core", endless)
    with signalled(endless.begun.wait), pytest.raises(Told):
        tokenizer.encode("a" * (CHUNK + 1))
    assert not endless.never.is_set()
    endless.never.set()


def test_a_wait_for_work_ends_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes between Python's look for signals and a wait without end would never be handled."""
    waits, join = list[float | None](), threading.Thread.join

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)
    done = threading.Event()
    threading.Timer(1.2, done.set).start()
    interruptible(done.wait)
    assert len(waits) > 1
    assert None not in waits


def test_a_template_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, waits, receive = load_tokenizer(CHAT), threading.Event(), confined.receive
    assert tokenizer is not None

    def received(*arguments: Any) -> bytes:
        waits.set()
        return receive(*arguments)

    chat = [{"role": "user", "content": "a"}]
    ids = tokenizer.encode_chat(chat)
    running = confined._child()._running
    assert running is not None
    os.kill(running[1].pid, signal.SIGSTOP)
    monkeypatch.setattr(confined, "receive", received)
    with signalled(waits.wait), pytest.raises(Told):
        tokenizer.encode_chat(chat)
    assert running[1].poll() is not None, "what it would still answer is no answer to the next question"
    assert not confined._child().knows
    assert tokenizer.encode_chat(chat) == ids


@pytest.mark.parametrize("style", STYLES)
def test_long_texts_have_the_same_tokens(style: str, tmp_path: Path) -> None:
    """They go another way through the library."""
    tokenizer = load_tokenizer(write_directory(tmp_path, style))
    assert isinstance(tokenizer, Tokenizer)
    text = " ".join(
        random.choices([*WORDS, "caf\u00e9", "\u6f22\u5b57", "\n\n", "</s>", "<|im_end|>"], k=CHUNK // 3)
    )
    assert len(text) > CHUNK
    tokenizer._core.encode_special_tokens = False
    assert tokenizer._encoder.whole(text, True) == tokenizer._core.encode(text, add_special_tokens=True).ids


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
