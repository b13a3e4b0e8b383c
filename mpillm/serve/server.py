"""`mpillm serve`: one engine on all ranks, and OpenAI's HTTP interface in front of it on rank 0."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn

from mpillm.comm.world import World
from mpillm.errors import JobError
from mpillm.run.job import open_journal
from mpillm.run.opened import found_here, model_of, model_path
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.serve import openapi
from mpillm.serve.app import make_app
from mpillm.serve.arrivals import Arrivals
from mpillm.serve.batches import Batches
from mpillm.serve.connections import Connection
from mpillm.serve.files import FileStore
from mpillm.serve.metrics import Metrics
from mpillm.serve.signals import first_signal_calls
from mpillm.serve.state import ServerState
from mpillm.serve.uploads import routes
from mpillm.spec import Spec
from mpillm.store import directory
from mpillm.store.directory import explained
from mpillm.store.output import try_lock

GRACE = 5  # seconds in which open connections may end


@dataclass(frozen=True)
class ServeOptions:
    """The options of the server: where it listens, and whom it answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_waiting: int = 1024  # requests
    origins: tuple[str, ...] = ()  # other sites whose pages may send requests


def run(world: World, spec: Spec, options: ServeOptions, progress: Progress) -> int:
    """Serve until a signal comes (collective); the exit code."""
    with contextlib.ExitStack() as stack:
        listener = None
        with world.together():
            if world.rank == 0:
                stack.callback(os.close, _claim(spec.output_path))
                listener = stack.enter_context(_listen(options))
        path = model_path(world, spec, progress)
        find = found_here(world, spec, progress)
        session = stack.enter_context(
            contextlib.closing(Session(world, spec, path, leave_out=True, find=find))
        )
        if listener is None:
            with first_signal_calls(lambda: None):  # rank 0 says when it ends
                return session.follow()
        return _lead(session, spec, path, options, listener, progress)


def _lead(
    session: Session,
    spec: Spec,
    path: Path,
    options: ServeOptions,
    listener: socket.socket,
    progress: Progress,
) -> int:
    model = model_of(session, path)
    engine = session.engine()
    arrivals = Arrivals(options.max_waiting, max(1, session.limits.max_running * 3 // 4))
    names = frozenset({model.name, *spec.model_names, str(path), *model.adapters})
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    metrics = Metrics(engine.totals)
    service = ServerState(spec, model, names, arrivals, metrics, options.api_key, options.origins, local)
    data = spec.output_path
    with explained(data):
        files = FileStore(data / "files")
        batches = Batches(
            data / "batches", files, arrivals, spec, model, partial(open_journal, session, spec)
        )
    for library in ("asyncio", "python_multipart"):  # they warn of what clients do
        logging.getLogger(library).setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(service, [*routes(files, batches), openapi.route(bool(options.api_key))]),
        http=Connection,
        log_level="error",  # a client's mistakes are not the server's
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    web = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http")
    for warning in session.warnings:
        progress.say(warning)
    with first_signal_calls(arrivals.close):
        web.start()
        try:
            for line in _greeting(model.name, host, port, options):
                progress.say(line)
            for finished in engine.run(arrivals, lambda: arrivals.more(batches.commit)):
                for completion in finished:
                    arrivals.take(completion)
                batches.commit()
                session.watch.check()
        finally:
            arrivals.close()
            server.should_exit = True
            web.join()
            batches.close()
            engine.stop(0)
    progress.say("The server has ended.")
    return 0


def _greeting(model: str, host: str, port: int, options: ServeOptions) -> Iterator[str]:
    """Yield the lines that tell where a server listens, with a warning if others may use it without a key."""
    if not (options.api_key or ipaddress.ip_address(host).is_loopback):
        yield (
            f"Everyone who reaches this machine by the network can use the server (--host {options.host}); add "
            "--api-key KEY to ask clients for a key."
        )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    yield f"{model} answers at {url} (web page, and OpenAI's API under /v1); Ctrl-C stops it."


def _claim(data: Path) -> int:
    """Return the descriptor that keeps other servers out of a directory of batches; JobError if there is one."""
    directory.make(data)
    with explained(data):
        file = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if try_lock(file, data):
            return file
    os.close(file)
    raise JobError(f"Another server uses {data}; stop it, or give another --data.")


def _listen(options: ServeOptions) -> socket.socket:
    """Return a socket that listens where the options say; JobError if there is something else."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address
        raise JobError(
            f"The server cannot listen on {options.host} port {options.port}: {reason}; "
            "give another --host or --port."
        ) from None
