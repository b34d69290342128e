"""Real servers on real sockets: one behaves as a test says, one speaks with a real model."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def completion(text: str | None, finish_reason: str = "stop") -> Answer:
    """A chat completion that says ``text``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice], "usage": usage}).encode()


class Server:
    """Answers each POST with what ``behave(number, body)`` returns; remembers the requests. Use it in ``with``.

    Attributes:
        posts: Bodies of the chat requests, in the order in which they came.
        headers: Their headers.
        models_status: Status of ``GET /v1/models``.
    """

    def __init__(self, behave: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.posts: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models_status = 200
        self.let_go = threading.Event()  # set at the end, so that a behaviour which hangs can be waited out
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.posts.append(body)
                    outer.headers.append(dict(self.headers))
                    number = len(outer.posts)
                self.answer(*behave(number, body) if self.path.endswith("/chat/completions") else (404, {}, b"nothing"))

            def do_GET(self) -> None:
                self.answer(outer.models_status, {}, b'{"data": []}')

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                    if len(content) < int(headers.get("Content-Length", 0)):
                        self.close_connection = True  # it broke off; whoever asked must not wait for the rest
                except OSError:
                    self.close_connection = True  # whoever asked has gone

            def log_message(self, *words: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = False  # so that closing waits for them

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                outer._connections.append(connection)
                return connection, address

        self._connections: list[socket.socket] = []
        self._server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # one that is kept alive would be waited for
        self._server.server_close()
        self._thread.join()


def speaks_with(model: Any, tokenizer: Any, num_kept: int = 160) -> Callable[[int, dict[str, Any]], Answer]:
    """What ``model`` says to the last ``num_kept`` tokens of the prompt; it has no room for more."""
    import torch

    lock = threading.Lock()

    @torch.no_grad()
    def behave(number: int, body: dict[str, Any]) -> Answer:
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -num_kept:]
        room = min(body["max_tokens"], 60)
        with lock:
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        ended = tokenizer.eos_token_id in out
        return completion(tokenizer.decode(out, skip_special_tokens=True), "stop" if ended else "length")

    return behave
