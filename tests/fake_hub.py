"""A model hub on this machine: real HTTP, so that the client library's own behaviour is part of the test."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FakeHub:
    """files["owner/repo/path"] = bytes, or (status, the hub's word for it).

    `asked` lists (method, path) of the requests for files.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes | tuple[int, str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.refuses = 0  # status with which nothing is taken
        self.address = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        where = request.path.lstrip("/").split("?")[0]
        if request.command == "POST":
            length = int(request.headers.get("Content-Length") or 0)
            return self._take(request, where, request.rfile.read(length))
        if where.startswith("api/models/"):
            owner, name = where.split("/")[2:4]
            body = json.dumps(
                [
                    {"type": "file", "path": f.removeprefix(f"{owner}/{name}/"), "size": 1, "oid": "0" * 40}
                    for f, content in self.files.items()
                    if isinstance(content, bytes) and f.startswith(f"{owner}/{name}/")
                ]
            ).encode()
            return self._send(request, 200, body, {"Content-Type": "application/json"})
        if "/resolve/" not in where:  # what else the library may want to know
            return self._send(request, 404, b"", {})
        self.asked.append((request.command, request.path))
        owner, name, _, _, path = where.split("/", 4)
        found = self.files.get(f"{owner}/{name}/{path}", (404, "EntryNotFound"))
        if isinstance(found, tuple):
            return self._send(request, found[0], b"", {"X-Error-Code": found[1], "X-Error-Message": "no"})
        self._send(request, 200, found, {"ETag": f'"{"a" * 40}"', "X-Repo-Commit": "c" * 40})
        return None

    def _take(self, request: http.server.BaseHTTPRequestHandler, where: str, body: bytes) -> None:
        """What a client does that publishes; `tokens` lists who it said it was."""
        self.tokens.append(request.headers.get("Authorization", ""))
        if self.refuses:
            return self._send(request, self.refuses, b'{"error": "no"}', {"Content-Type": "application/json"})
        answer: dict = {}
        if where == "api/repos/create":
            name = json.loads(body)
            answer = {"url": f"{self.address}/{name.get('organization')}/{name['name']}"}
        elif "/preupload/" in where:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        elif "/commit/" in where:
            repository = "/".join(where.split("/")[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{self.address}/{repository}/commit/{'d' * 40}", "commitOid": "d" * 40}
        return self._send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(
        self, request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@contextmanager
def serving() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fake.answer(self)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
