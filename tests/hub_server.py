"""A server on this machine that speaks as much of the Hugging Face hub's protocol as its client needs to read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    """Repositories are folders: ROOT/datasets/OWNER/NAME and ROOT/models/OWNER/NAME."""

    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]
    fail_after: list[int]  # the number of files' parts that are served, none after them; empty: all

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(body or b"{}") if body[:1] == b"{" else {})

    def _answer(self, body: dict | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {self.path}")
        words = path.strip("/").split("/")
        if words[0] == "api":
            self._api(words[1], words[2:], body or {})
        elif "resolve" in words:
            kind = "datasets" if words[0] == "datasets" else "models"
            owner = words[1:3] if kind == "datasets" else words[:2]
            self._file(self.root / kind / "/".join(owner) / "/".join(words[words.index("resolve") + 2 :]))
        else:
            self._missing()

    def _api(self, kind: str, words: list[str], body: dict) -> None:
        folder = self.root / kind / "/".join(words[:2])
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _oid(path)}
            for path in files
        ]
        what = words[2] if len(words) > 2 else "revision"
        if what == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            self._json({"id": "/".join(words[:2]), "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})
        elif what == "tree":
            inside = "/".join(words[4:])
            self._json([entry for entry in entries if entry["path"].startswith(inside)])
        elif what == "paths-info":
            self._json([entry for entry in entries if entry["path"] in body.get("paths", [])])
        else:
            self._missing()

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        content, status, extra = path.read_bytes(), 200, {}
        total = len(content)
        if asked := self.headers.get("Range"):
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop) if stop else total - 1, total - 1)
            content, status = content[first : last + 1], 206
            extra = {"Content-Range": f"bytes {first}-{last}/{total}"}
        if self.command == "GET" and self.fail_after:
            self.fail_after[0] -= 1
            if self.fail_after[0] < 0:
                self._missing("EntryNotFound")  # the client tries again for half a minute where a connection breaks
                return
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", **extra}
        self._send(status, content, "application/octet-stream", headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), "application/json", {})

    def _missing(self, code: str = "") -> None:
        self._send(404, b"{}", "application/json", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub(root: Path, fail_after: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the folder; yields the address for HF_ENDPOINT, and the requests as they come."""
    requests: list[str] = []
    limit = [] if fail_after is None else [fail_after]
    handler = type("Hub", (_Hub,), {"root": root, "requests": requests, "fail_after": limit})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
