"""A server of the tool's own, in a thread, and a run that goes on."""

import json
from contextlib import contextmanager
from http.client import HTTPConnection
from threading import Thread
from types import SimpleNamespace

# a name, a row or a setting that wants to be markup
EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(1)>&\"'\ud800\0"


@contextmanager
def served(server):
    """``server`` answers while the test goes on."""
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(server, path, method="GET", body=None, **headers):
    """Status, headers and body of an answer over HTTP; ``path`` goes out as it is."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1])
    try:
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        data = None if body is None else body.encode()
        headers |= {} if data is None else {"Content-Length": str(len(data))}
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(data)
        response = connection.getresponse()
        return SimpleNamespace(status=response.status, headers=response.headers, body=response.read())
    finally:
        connection.close()


def lines(folder):
    """Of a run's metrics."""
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


def append(folder, some, name="metrics.jsonl"):
    """Write ``some`` lines, or rows, as a run does."""
    with (folder / name).open("a") as file:
        file.write("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in some))
