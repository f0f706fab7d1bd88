"""Tars in the layout of WebDataset for tests, and a loopback server of files that can fail, stall, cut and change."""

import io
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image


def write_tar(
    path: Path, files: Mapping[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of the files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def png(number: int = 0, height: int = 4, width: int = 6) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


class FileServer(ThreadingHTTPServer):
    """Serves bytes by name on the loopback interface.

    Attributes:
        files: name -> content; may be changed at any time.
        faults: what happens to the next GET requests, first to last: "500", "stall", "cut".
        ranges: False: whole files alone.
        log: (method, name, range) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges = True
        self.log: list[tuple[str, str, str]] = []
        self.released = threading.Event()

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def gets(self, name: str) -> int:
        return sum(method == "GET" and name == asked for method, asked, _ in self.log)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, name = self.server, self.path.lstrip("/")
        wanted = self.headers.get("Range", "")
        server.log.append((self.command, name, wanted))
        fault = server.faults.pop(0) if body and server.faults else ""
        content = server.files.get(name)
        if fault == "500" or content is None:
            self.send_response(500 if content is not None else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, len(content)
        if wanted and server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if body:
            self._send(content[start:end], fault)

    def _send(self, data: bytes, fault: str) -> None:
        try:
            self.wfile.write(data[: len(data) // 2] if fault else data)
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(20)
            if fault:
                self.close_connection = True
        except OSError:
            pass  # who asked is gone


@contextmanager
def served() -> Iterator[FileServer]:
    server = FileServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def until(condition, seconds: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
