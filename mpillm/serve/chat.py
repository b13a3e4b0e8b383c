"""`mpillm chat`: a conversation in the terminal, on any number of ranks.

The engine runs in the main thread; another thread reads what is typed on rank 0 and prints the answers. The
conversation's beginning stays in the KV cache from turn to turn.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from mpillm.batch.endpoints.chat import ChatCompletionsEndpoint
from mpillm.batch.streaming import ChatStream
from mpillm.batch.work import Model
from mpillm.comm.launch import MPICH, launched_by
from mpillm.comm.world import World
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import JobError, RequestError
from mpillm.run.opened import found_here, model_of, model_path
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.serve.arrivals import Arrivals, Closed, Ticket
from mpillm.serve.prepare import prepare
from mpillm.serve.signals import first_signal_calls
from mpillm.serve.typed import Typed
from mpillm.spec import Spec
from mpillm.words import count_of

HELP = """\
/help          show this help
/system TEXT   start a new conversation with a system message
/reset         start a new conversation
/retry         answer the last message again
/exit          leave"""
NEW = "/reset starts a new conversation"
CTRL_D = "Ctrl-D         leave\nCtrl-C         stop the answer; "


def run(world: World, spec: Spec, progress: Progress, lines: Typed) -> int:
    """Talk until the lines, which rank 0 reads, end (collective); the exit code."""
    path = model_path(world, spec, progress)
    find = found_here(world, spec, progress)
    with contextlib.closing(Session(world, spec, path, leave_out=True, find=find)) as session:
        if world.rank:
            with first_signal_calls(lambda: None):  # rank 0 says when it ends
                return session.follow()
        model = model_of(session, path)
        for warning in session.warnings:
            progress.say(warning)
        engine = session.engine()
        arrivals = Arrivals(capacity=1, background=0)
        chat = Conversation(spec, model, arrivals, lines, progress.say)
        reader = threading.Thread(target=chat.talk, name="chat")
        with first_signal_calls(chat.end, on_sigint=chat.interrupt):
            try:
                if model.text is None or not model.text.has_chat:
                    raise JobError(f"{model.name} has no chat template; use mpillm run with prompts.")
                progress.say(f"Talking to {model.name}; /help lists the commands.")
                reader.start()
                for finished in engine.run(arrivals, arrivals.more):
                    for completion in finished:
                        arrivals.take(completion)
                    session.watch.check()
            finally:
                arrivals.close()
                lines.end()
                if reader.ident is not None:
                    reader.join()
                engine.stop(0)
        return 0


class Conversation:
    """A conversation."""

    def __init__(
        self,
        spec: Spec,
        model: Model,
        arrivals: Arrivals,
        read: Callable[[str], str],
        say: Callable[[str], None],
    ) -> None:
        """`read` returns a line that is typed after a prompt, and raises EOFError at the end; `say` is for remarks."""
        self._spec, self._model, self._arrivals = spec, model, arrivals
        self._read, self._say, self._write = read, say, sys.stdout.write
        self._messages: list[dict[str, Any]] = []
        self._ticket: Ticket | None = None
        self._answers = self._stopped = False  # a message is being answered; that is to end
        self._thinks = False  # what was written last is reasoning
        self._cut = False  # it was said how an answer may be longer

    def talk(self) -> None:
        """Read, answer, and end the engine's work at last."""
        try:
            while not self._arrivals.closed and self._turn(self._read("> ").strip()):
                pass
        except (EOFError, Closed):
            self._write("\n")
        finally:
            self._arrivals.close()

    def interrupt(self) -> None:
        """Stop the answer that is being given; the conversation, if there is none."""
        if not self._answers:
            self._arrivals.close()
        self._stop()

    def end(self) -> None:
        """End the conversation, and an answer with it."""
        self._arrivals.close()
        self._stop()

    def _stop(self) -> None:
        self._stopped = True  # also before there is a ticket
        if self._ticket is not None:
            self._ticket.cancel()

    def _turn(self, line: str) -> bool:
        """Do what a line says; False at the end."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._ask({"role": "user", "content": line})
        elif word == "/exit":
            return False
        elif word == "/reset":
            self._messages = [message for message in self._messages[:1] if message["role"] == "system"]
        elif word == "/system":
            self._messages = [{"role": "system", "content": rest}] if rest else []
        elif word == "/retry" and len(self._messages) > 1:
            self._messages.pop()
            self._ask(self._messages.pop())
        else:
            self._write(f"{HELP}\n{_keys()}\n")
        return True

    def _ask(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        text, self._stopped, self._answers = "", False, True
        try:
            text = self._answer()
        except RequestError as error:
            self._write(f"{error}{f'; {NEW}' if len(self._messages) > 1 else ''}\n")
        finally:
            self._answers = False
        if text:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def _answer(self) -> str:
        """Return the answer to the messages so far, written as it comes."""
        work = prepare(ChatCompletionsEndpoint.url, {"messages": self._messages}, self._spec, self._model)
        assert isinstance(work.endpoint, ChatCompletionsEndpoint)
        events: queue.SimpleQueue[int | list[FinishedCompletion] | None] = queue.SimpleQueue()
        stream = ChatStream(work.endpoint, work.requests[0], self._spec, self._model)
        ticket = Ticket(work, events.put, lambda _, token: events.put(token))
        self._ticket = ticket
        if self._stopped:
            ticket.cancel()
        text = ""
        try:
            self._arrivals.submit(ticket)
            while isinstance(event := events.get(), int):
                text += self._show(stream.push(event))
        finally:
            self._ticket = None
        if event is None and not ticket.cancelled:
            raise Closed("The conversation has ended.")
        if event is not None and not ticket.cancelled:
            body = work.endpoint.response(work, event, self._model)
            choice = msgspec.json.decode(body["choices"][0])
            text += self._show(stream.rest(choice["message"]))
        self._show({"content": "\n"})
        if event is not None and event[0].finish_reason == "length":
            self._say_why_cut(len(event[0].tokens))
        return text

    def _say_why_cut(self, tokens: int) -> None:
        limit = self._spec.sampling.max_tokens
        if tokens < limit:
            self._say(f"The answer was cut because the context is full; {NEW}.")
        elif not self._cut:
            self._cut = True
            self._say(
                f"The answer was cut after {count_of(limit, 'token')}; --set "
                f"sampling.max_tokens={4 * limit} allows more."
            )

    def _show(self, delta: dict[str, Any]) -> str:
        """Write what comes of an answer; its content."""
        thought, content = str(delta.get("reasoning_content", "")), str(delta.get("content", ""))
        self._write(thought)
        self._thinks = self._thinks or bool(thought)
        if content and self._thinks:
            self._write("\n\n")
            self._thinks = False
        self._write(content)
        sys.stdout.flush()
        return content


def _keys() -> str:
    """Return the effect of keys."""
    started = launched_by(os.environ)
    if started is None:
        return f"{CTRL_D}between answers, leave"
    # Open MPI's mpiexec tells nobody of Ctrl-D.
    return f"{CTRL_D}a second one ends mpiexec" if started.launcher == MPICH else "Ctrl-C         end mpiexec"
