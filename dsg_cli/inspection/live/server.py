"""A small server on 127.0.0.1, for one person: a page, what it shows at first, and an answer to each prompt.

Only this machine can reach it, and only its own page can use it: requests must name it as their host (a web site whose
name is made to point here does not), prompts must come as JSON from the same origin (a form or another site's script
cannot send that), and nothing that is read by GET changes anything. Prompts are not written to a file or a log.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from dsg_cli.errors import DsgError
from dsg_cli.workspace.body import Json

HOST = "127.0.0.1"
LONGEST = 64 * 1024
"""Bytes of a request."""
SECONDS = 10
"""For a request to arrive in."""

PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """The page's server; one prompt is answered at a time, since there is one model."""

    daemon_threads = True

    about: Json
    """What the page shows at first."""
    ask: Callable[[Json], Json]
    """A prompt as the page sends it -> what is shown of it; called by one thread at a time."""

    def __init__(self, port: int) -> None:
        """Take the port, or for 0 any that is free; `about` and `ask` are to be set before anything is served."""
        self.one_at_a_time = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DsgError(f"Port {port} of {HOST} cannot be used: {reason}.", "Take another with --port.") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "dsg", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        """The page and its parts."""
        if not self._is_ours():
            return
        if self.path == "/api/about":
            self._send_json(self.server.about)
        elif self.path in PAGES:
            name, kind = PAGES[self.path]
            self._send(HTTPStatus.OK, files("dsg_cli.inspection.live").joinpath(name).read_bytes(), kind)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")

    def do_POST(self) -> None:
        """A prompt."""
        if not self._is_ours():
            return
        if self.path != "/api/ask":
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal():
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A prompt is sent as JSON, with its length.")
        elif int(length) > LONGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"That is more than {LONGEST} bytes.")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes) -> None:
        try:
            request = json.loads(body)
            if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
                raise ValueError
        except (ValueError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, 'A prompt is sent as {"prompt": ...}.')
            return
        try:
            with self.server.one_at_a_time:
                answer = self.server.ask(request)
        except DsgError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, f"{error.message} {error.hint or ''}".strip())
            return
        self._send_json(answer)

    def _is_ours(self) -> bool:
        """Whether the request is for this server, and from its own page if from any."""
        hosts = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{host}" for host in hosts}):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "This page answers only to itself, on this machine.")
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # What was sent with it may not have been read.
        self._send_json({"error": why}, status)

    def _send_json(self, answer: Json, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: prompts are nobody's business."""
