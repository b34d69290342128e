"""The server of the page: a few names that it answers to, and no file by its path. On this machine alone, unless told otherwise."""

from __future__ import annotations

import gzip
import hmac
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lisatune.errors import UserError

PORT = 8421
IDLE_SECONDS = 60  # that a connection may say nothing
LEAST_COMPRESSED = 1000  # bytes
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",  # no thread waits for a page that may never ask again
}


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    body: bytes
    kind: str = "application/json"


def as_json(value: Any) -> Answer:
    """``value`` for the page's script."""
    return Answer(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())


Get = Callable[[Mapping[str, str]], Answer]
Routes = Mapping[str, Get]


class PageServer(ThreadingHTTPServer):
    """Answers ``GET`` of the paths in ``routes``, each with a function of the query's values.

    Args:
        routes: Path to function; no other path exists.
        host: Address to listen on. One that other machines reach gets a token.
        port: 0 takes any that is free.
    Raises: UserError if it cannot listen there.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, routes: Routes, host: str = "127.0.0.1", port: int = PORT) -> None:
        self.routes, self.host = dict(routes), host
        self.token = None if is_loopback(host) else secrets.token_urlsafe(32)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot listen on {host}, port {port} ({reason}): choose another --host or --port"
            ) from error

    @property
    def url(self) -> str:
        """What to open, with the token if there is one."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        name = socket.gethostname() if self.host in ("0.0.0.0", "::") else name
        return f"http://{name}:{self.server_address[1]}/" + (f"?token={self.token}" if self.token else "")

    @property
    def cookie(self) -> str:
        """The name of the cookie that holds the token; cookies are shared by all ports of a host."""
        return f"lisatune-{self.server_address[1]}"

    def knows_host(self, header: str) -> bool:
        """Whether a ``Host`` header names this server.

        A page of somebody else can make its own name lead to this machine, and would then be of one origin with us. Names
        are therefore ours alone; an address in numbers cannot be made to lead elsewhere.
        """
        with suppress(ValueError):
            name = (urlsplit(f"//{header}").hostname or "").removesuffix(".")
            with suppress(ValueError):
                return bool(ipaddress.ip_address(name))
            return name in {"localhost", self.host.lower(), socket.gethostname().lower()}
        return False

    def lets_in(self, handler: BaseHTTPRequestHandler, query: Mapping[str, str]) -> bool:
        """Whether a request brings the token: in its address, in a cookie or as a bearer."""
        if self.token is None:
            return True
        given = [query.get("token", ""), handler.headers.get("Authorization", "").removeprefix("Bearer ")]
        with suppress(CookieError):
            cookies = SimpleCookie(handler.headers.get("Cookie", ""))
            given += [cookies[self.cookie].value] if self.cookie in cookies else []
        token = self.token.encode()
        return any(hmac.compare_digest(one.encode(errors="replace"), token) for one in given)

    def server_bind(self) -> None:
        """As the base class does, but without asking a name server for our name, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a link that broke: the page asks again."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "lisatune", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        """The answer of a route, or a refusal."""
        if not self.server.knows_host(self.headers.get("Host", "")):
            return self.refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server goes by another name")
        try:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, max_num_fields=20).items()}
        except ValueError:
            return self.refuse(HTTPStatus.BAD_REQUEST, "this address cannot be read")
        if not self.server.lets_in(self, query):
            return self.refuse(HTTPStatus.UNAUTHORIZED, "open the address that lisatune printed, with its token")
        route = None if parts.netloc else self.server.routes.get(parts.path)
        if route is None:
            return self.refuse(HTTPStatus.NOT_FOUND, "no such page")
        return self.answer(route(query), brought_token="token" in query)

    def refuse(self, status: HTTPStatus, reason: str) -> None:
        """Say in a line why not."""
        self._send(status, Answer(f"{status.value} {reason}\n".encode(), "text/plain; charset=utf-8"))

    def answer(self, answer: Answer, *, brought_token: bool = False) -> None:
        """Send ``answer``; who brought the token in the address gets a cookie, so that it can leave the address."""
        cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
        self._send(HTTPStatus.OK, answer, {"Set-Cookie": cookie} if brought_token and self.server.token else {})

    def _send(self, status: HTTPStatus, answer: Answer, more: Mapping[str, str] | None = None) -> None:
        body, headers = answer.body, HEADERS | {"Content-Type": answer.kind} | dict(more or {})
        if len(body) >= LEAST_COMPRESSED and "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers = gzip.compress(body, 6, mtime=0), headers | {"Content-Encoding": "gzip"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address may hold the token."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("gpu7")
        (True, True, True, False, False)
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
