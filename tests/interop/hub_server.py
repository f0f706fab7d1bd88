"""A stand-in for the Hugging Face Hub: the few addresses that an upload needs, on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Hub:
    """What it holds, and how it misbehaves.

    Attributes:
        files: {name: bytes} of the commits.
        private: of the repository; None: there is none yet.
        fails: what it answers to a commit: an HTTP status; "cut": it closes the connection; None: it takes it.
        tokens: what callers have shown.
        asked: the addresses, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.fails: int | str | None = None
        self.tokens: list[str] = []
        self.asked: list[str] = []
        self.address = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        path = path.partition("?")[0]
        self.asked.append(path)
        if path == "/api/repos/create":
            known, asked = self.private is not None, json.loads(body)
            if not known:
                self.private = asked.get("visibility") == "private" or asked.get("private", False)
            return (409 if known else 200), {"url": f"{self.address}/somebody/model"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/somebody/model/commit/0"}
        return 200, {"id": "somebody/model", "private": self.private, "sha": "0" * 40, "siblings": []}


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.append(self.headers.get("Authorization", ""))
            if hub.fails == "cut" and "/commit/" in self.path:
                self.close_connection = True
                return
            failing = isinstance(hub.fails, int) and (hub.fails == 401 or "/commit/" in self.path)
            status, found = (hub.fails, {"error": "no"}) if failing else hub.answer(self.path, body)
            text = json.dumps(found).encode()
            self.send_response(status)  # type: ignore[arg-type]
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """The stand-in in the hub's place, with a token, and no waiting between attempts."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with serving(found := Hub()):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
        yield found
