"""A stand-in of the model hub on 127.0.0.1: one repository, the few endpoints that a download uses, and a list of what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from model_files import COMMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

# name of a repository: (status, X-Error-Code) that the hub answers for it
REFUSED = {
    "org/unknown": (401, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, ""),
    "org/broken": (500, ""),
    "org/forbidden": (403, ""),
}


class Hub:
    """`files` of the repository org/tiny at COMMIT (main and v1); `asked` lists (method, path) of each request."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def answer(self, method: str, target: str) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(target).path)
        self.asked.append((method, path))
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repo != "org/tiny":
            status, code = REFUSED.get(repo, (404, "RepoNotFound"))
            return status, {"X-Error-Code": code} if code else {}, b"{}"
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/org/tiny/").split("/"))
        return self._file(path.removeprefix("/org/tiny/resolve/").split("/", 1))

    def _api(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        kind, revision = parts[0], parts[1]
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "revision":
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        listing = [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in self.files.items()]
        return 200, {}, json.dumps(listing).encode()

    def _file(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        data = self.files.get(parts[1])
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}, data


@contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
