"""A hub on this machine, for the library's real requests; it stops in the midst of a file until it is told to go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c0" * 20
CHUNK = 1 << 14


class SlowHub(ThreadingHTTPServer):
    """One repository for all names, with `files`; `served` counts their bytes, apart from those of ranges."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.served, self.limit = files, 0, 0
        self.reached, self.goes_on = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def serve_chunk(self, size: int) -> None:
        """Count bytes; wait at the limit."""
        if self.served + size > self.limit:
            self.reached.set()
            self.goes_on.wait()
        self.served += size


@contextlib.contextmanager
def slow_hub(files: Mapping[str, bytes]) -> Iterator[SlowHub]:
    """The hub, which ends with the context."""
    with SlowHub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.goes_on.set()
            hub.shutdown()
            thread.join()


class _Answer(BaseHTTPRequestHandler):
    server: SlowHub

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/"):
            return self._describe(path)
        data = self.server.files.get(path.split("/", 5)[5])
        if data is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        sent, headers = data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wanted:
            first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
            sent = data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(sent) - 1}/{len(data)}"
        self._head(206 if wanted else 200, len(sent), headers)
        if self.command == "HEAD":
            return None
        with contextlib.suppress(OSError):  # who asked is gone
            for at in range(0, len(sent), CHUNK):
                chunk = sent[at : at + CHUNK]
                if not wanted:
                    self.server.serve_chunk(len(chunk))
                self.wfile.write(chunk)
        return None

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _describe(self, path: str) -> None:
        files = self.server.files
        listed: object = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if not {"tree", "paths-info"} & set(path.split("/")):
            listed = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        said = json.dumps(listed).encode()
        self._head(200, len(said), {"Content-Type": "application/json"})
        self.wfile.write(said)

    def _head(self, status: int, size: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
