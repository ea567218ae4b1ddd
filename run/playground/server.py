"""The playground over HTTP, with the standard library: one page, and the answers of views.py as JSON.

It listens on this machine alone unless a host is named; then every request needs the token of the address that is printed.
Requests that another site makes a browser send are refused: by Host, by Origin, and because only JSON is taken.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import sys
import traceback
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from core.errors import UserError
from core.files import ROOT
from run.playground import views

LOOPBACK = "127.0.0.1"
PORT, PORTS_TRIED = 7860, 20
LARGEST = 48 << 20  # bytes of a request: two pictures as base64
PATIENCE = 60.0  # seconds for the other side to send or take a piece
HERE = Path(__file__).resolve().parent


class Refused(Exception):
    """A request that is not looked into: status and sentence."""

    def __init__(self, status: HTTPStatus, sentence: str):
        super().__init__(sentence)
        self.status = status


def page() -> tuple[bytes, str]:
    """The page with everything in it, and the Content-Security-Policy that lets it talk to its server alone."""
    style = (ROOT / "evaluation" / "report.css").read_text() + (HERE / "page.css").read_text()
    script = (HERE / "page.js").read_text()
    html = (HERE / "page.html").read_text().replace("{{style}}", style).replace("{{script}}", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


class Server(ThreadingHTTPServer):
    """A playground that is ready to `serve_forever`, a thread for each request.

    Args:
        models: what it shows.
        host: where it listens; other than this machine alone, requests need `token`.
        port: 0: any that is free.
    """

    daemon_threads = True

    def __init__(self, models: views.Models, host: str = LOOPBACK, port: int = 0):
        super().__init__((host, port), Handler)
        self.models = models
        self.token = "" if host == LOOPBACK else secrets.token_urlsafe(16)
        self.page, self.policy = page()
        self.examples = views.examples()

    @property
    def address(self) -> str:
        """What to open."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request, client_address) -> None:
        """Who closed the page is not worth a traceback."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = PATIENCE

    def log_message(self, format: str, *args) -> None:
        """Nothing: the address would show the token."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, what: Callable[[str], None]) -> None:
        """Refusals and mistakes become a sentence; whatever happens, the server lives on."""
        self.begun = False
        try:
            self._check()
            what(urlsplit(self.path).path)
        except Refused as error:
            self._fail(error.status, str(error))
        except UserError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            traceback.print_exc()
            said = f"this did not work ({type(error).__name__}: {error}); the terminal of the playground shows where."
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, said)

    def _check(self) -> None:
        """Refuse what does not come from the page of this server."""
        host = self.headers.get("Host", "")
        if not self.server.token:
            port = self.server.server_address[1]
            if host not in (f"{name}:{port}" for name in (LOOPBACK, "localhost")):
                raise Refused(HTTPStatus.FORBIDDEN, f"open {self.server.address}: other names are not answered.")
        elif not self._knows_token():
            raise Refused(HTTPStatus.FORBIDDEN, "the token is missing: open the address that the terminal shows.")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, "another site's requests are not answered.")

    def _knows_token(self) -> bool:
        query = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        token = self.headers.get("X-Token") or query
        return hmac.compare_digest(token.encode(), self.server.token.encode())

    def _get(self, path: str) -> None:
        if path == "/":
            self._send_head(HTTPStatus.OK, "text/html; charset=utf-8", len(self.server.page))
            self.wfile.write(self.server.page)
        elif path == "/models":
            self._send_json({**self.server.models.describe(), "examples": self.server.examples})
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is nothing at {path}.")

    def _post(self, path: str) -> None:
        request = self._read()
        if path == "/tokenize":
            self._send_json(views.tokenize(self.server.models, request))
        elif path == "/edit":
            self._send_json(views.edit(self.server.models, request))
        elif path == "/generate":
            views.generate(self.server.models, request, self._send_line)
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is nothing at {path}.")

    def _read(self) -> views.Fields:
        """The JSON object that was sent."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say the Content-Length.")
        if int(length) > LARGEST:
            said = f"this is too large: {int(length) >> 20} MiB, {LARGEST >> 20} are taken. Choose smaller pictures."
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, said)
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise UserError("what was sent is not JSON.") from None
        if not isinstance(request, dict):
            raise UserError("a JSON object was expected.")
        return request

    def _send_head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        headers = {
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_json(self, answer: views.Fields, status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(answer).encode()
        self._send_head(status, "application/json", len(data))
        self.wfile.write(data)

    def _send_line(self, answer: views.Fields) -> None:
        """One of several answers to a request, a line of JSON each; the connection's end is theirs."""
        if not self.begun:
            self._send_head(HTTPStatus.OK, "application/x-ndjson")
        self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _fail(self, status: HTTPStatus, sentence: str) -> None:
        if self.begun:
            self._send_line({"error": sentence})
        else:
            self._send_json({"error": sentence}, status)


def open_server(models: views.Models, host: str = LOOPBACK, port: int | None = None) -> Server:
    """A server on `port`; None: the first free one from PORT on. UserError where that is impossible."""
    tried: Sequence[int] = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    reason = ""
    for number in tried:
        try:
            return Server(models, host, number)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"cannot listen on {host}, port {tried[0]} ({reason}). Give another --port or --host.")
