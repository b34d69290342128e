"""The server of the page: a few names that it answers to, and no file by its path. On this machine alone, unless told otherwise."""

from __future__ import annotations

import gzip
import hmac
import ipaddress
import json
import re
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lisatune.errors import UserError, one_line

PORT = 8421
IDLE_SECONDS = 60  # that a connection may say nothing
MOST_CONNECTIONS = 64  # at a time: each takes a thread and a file of the process, which may have other work
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
Post = Callable[[dict[str, Any]], Any]
TOKEN_HEADER = "X-Lisatune-Token"
MOST_BODY_BYTES = 2**20


class PageServer(ThreadingHTTPServer):
    """Answers ``GET`` of the paths in ``routes``, each with a function of the query's values.

    Args:
        routes: Path to function; no other path exists.
        host: Address to listen on. One that other machines reach gets a token.
        port: 0 takes any that is free.
        posts: Path to function of what the page sends, for what changes something.
        token: The token, which ``posts`` need; the page sends it in a header, as no other site can.
    Raises: UserError if it cannot listen there.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, routes: Routes, host: str = "127.0.0.1", port: int = PORT, *, posts: Mapping[str, Post] | None = None,
        token: str | None = None,
    ) -> None:  # fmt: skip
        assert token or not posts, "whoever may change something needs a token"
        self.routes, self.posts, self.host = dict(routes), dict(posts or {}), host
        self.token = token or (None if is_loopback(host) else new_token())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = BoundedSemaphore(MOST_CONNECTIONS)
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
        return any(map(self.is_token, given))

    def is_token(self, word: str) -> bool:
        """Whether ``word`` is the token; how long that takes does not tell how much of it is right."""
        return hmac.compare_digest(word.encode(errors="replace"), (self.token or secrets.token_hex()).encode())

    def server_bind(self) -> None:
        """The same as in the base class, but without a name server, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for a further connection; the page asks again if not."""
        return self._free.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class does; then there is room again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a link that broke: the page asks again."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """A request gets no answer.

    Attributes:
        status: What it gets.
    """

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "lisatune", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        """The answer of a route."""
        with self.refusals():
            path, query = self.admitted()
            if path not in self.server.routes:
                raise Refused(HTTPStatus.NOT_FOUND, "no such page")
            self.answer(self.server.routes[path](query), brought_token="token" in query)

    def do_POST(self) -> None:
        """What a function of ``posts`` returns, as JSON; of a user's mistake the sentence that says so."""
        with self.refusals():
            path, _ = self.admitted()
            if not self.server.is_token(self.headers.get(TOKEN_HEADER, "")):
                raise Refused(HTTPStatus.FORBIDDEN, f"{TOKEN_HEADER} is missing")
            if path not in self.server.posts:
                raise Refused(HTTPStatus.NOT_FOUND, "no such page")
            self.answer(as_json(self.server.posts[path](self.body())))

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Say why a request is refused, instead of an answer."""
        try:
            yield
        except Refused as refused:
            self._send(
                refused.status, Answer(f"{refused.status.value} {refused}\n".encode(), "text/plain; charset=utf-8")
            )
        except UserError as error:
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, as_json({"error": str(error)}))
        except ConnectionError:
            raise
        except (
            Exception
        ) as error:  # a model's code and memory can raise anything: the server goes on, and the page shows the error
            traceback.print_exc()
            told = one_line(f"{type(error).__name__}: {error}")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, Answer(told.encode(), "text/plain; charset=utf-8"))

    def admitted(self) -> tuple[str, dict[str, str]]:
        """Path and query of a request that may be answered.

        Raises: Refused for any other.
        """
        if not self.server.knows_host(self.headers.get("Host", "")):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server goes by another name")
        try:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, max_num_fields=20).items()}
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "this address cannot be read") from None
        if not self.server.lets_in(self, query):
            raise Refused(HTTPStatus.UNAUTHORIZED, "open the address that lisatune printed, with its token")
        return ("" if parts.netloc else parts.path), query

    def body(self) -> dict[str, Any]:
        """The object that the page sends.

        Raises: Refused for anything else.
        """
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length) or int(length) > MOST_BODY_BYTES:
            raise Refused(HTTPStatus.BAD_REQUEST, f"send its length, at most {MOST_BODY_BYTES:,} bytes")
        try:
            loaded = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            loaded = None
        if not isinstance(loaded, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "this cannot be read")
        return loaded

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


def new_token() -> str:
    """A word that nobody guesses."""
    return secrets.token_urlsafe(32)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("gpu7")
        (True, True, True, False, False)
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
