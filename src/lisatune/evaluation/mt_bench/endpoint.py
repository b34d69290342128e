"""An OpenAI-compatible endpoint: requests that are paced, retried and limited in number. Needs no torch."""

from __future__ import annotations

import email.utils
import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from lisatune.errors import UserError, missing_package, one_line

TRIES, TRIES_TIMED_OUT = 6, 2  # tries of one request: fewer after timeouts, which cost minutes and maybe money
LONGEST_WAIT_SECONDS = 600.0  # that a server may ask for; beyond it a person should know
REPLACED = {"max_tokens": "max_completion_tokens", "temperature": None}
TIMEOUT_SECONDS = 600.0  # a small judge on a CPU takes minutes for one verdict


class BudgetSpent(Exception):
    """The budget does not allow another request."""


class RequestRefused(UserError):
    """The server will not answer this one request, whatever it thinks of others.

    Attributes:
        field: Field of the request that the server names as the reason; or None.
    """

    def __init__(self, message: str, field: Any = None) -> None:
        super().__init__(message)
        self.field = field


class _Again(Exception):
    """A try that failed in a way that may pass."""

    def __init__(self, reason: str, wait_seconds: float | None = None, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.timed_out = timed_out


class Endpoint:
    """``POST url/chat/completions``, from as many threads as one likes; every request sent counts, retries too.

    Tried again, after 1, 2, 4, ... seconds or as long as ``Retry-After`` says: statuses 408, 409, 429 and 5xx, broken connections,
    timeouts (once), and answers that are no chat completion. While one request waits, no other is sent. Not tried again:
    a wrong key, address or model, and a server that has never been reached. Models that think before they answer do not
    take ``max_tokens`` and ``temperature``: where the server says so, ``max_completion_tokens`` is sent instead, and no temperature.

    Args:
        url: Base address, which usually ends in ``/v1``.
        model: Name of the model there.
        key: API key, or None to send none. It is written nowhere.
        budget: Requests at most, or None.
        requests_per_minute: Requests in a minute at most; None sets no limit.
        timeout_seconds: Without any byte of an answer.
        backoff_seconds: Length of the first wait.
        tell: Is called with a sentence before a wait.
    Raises: UserError for an address or a key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        budget: int | None = None,
        requests_per_minute: int | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        backoff_seconds: float = 1.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise missing_package("httpx2", "judging", "judge") from error
        self.url, self.model, self.tell = check_url(url), model, tell
        self.budget, self.num_sent = budget, 0
        self.backoff_seconds = backoff_seconds
        self._pace = _Pace(60 / requests_per_minute if requests_per_minute else 0.0)
        self._lock = threading.Lock()
        self._reached = False
        self._foreign: set[str] = set()  # fields that the server does not take
        self._http = httpx2
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {check_key(key)}"} if key else {},
            timeout=httpx2.Timeout(timeout_seconds, connect=min(10.0, timeout_seconds)),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stop(self) -> None:
        """Send nothing more; who waits to send is let go with ``BudgetSpent``."""
        self._pace.stop()

    def check(self) -> None:
        """Find a wrong address or key before hours of work, by asking for the list of models, which costs nothing.

        Raises: UserError if nothing answers, or it does not accept the key.
        """
        try:
            answer = self._client.get(f"{self.url}/models", timeout=10.0)
        except self._http.TimeoutException:
            return  # a small server that is busy
        except (self._http.TransportError, self._http.InvalidURL) as error:
            raise self._unreachable(error) from error
        self._reached = True
        if answer.status_code in (401, 403):
            raise self._wrong_key(answer)

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to a chat request, in which there is a reply.

        Args:
            body: Body of the request, without the model's name.
        Returns: ``reply``, the text (empty if the model said nothing); ``finish_reason``; ``usage``, as the server says;
            ``left_out``, the fields that were not sent as they are in ``body``.
        Raises: RequestRefused if the server will not have this request; BudgetSpent; UserError if it is no use going on.
        """
        num_timed_out = 0
        for number in range(TRIES):
            self._count()
            try:
                return self._try(body)
            except _Again as failed:
                num_timed_out += failed.timed_out
                if number + 1 == TRIES or num_timed_out == TRIES_TIMED_OUT:
                    raise UserError(
                        f"the judge at {self.url} gave no answer in {number + 1} tries ({failed}): what is done is kept; run "
                        "the same command again when the judge works"
                    ) from failed
                self._wait(failed, number)
            except RequestRefused as refused:
                if refused.field not in REPLACED or number + 1 == TRIES:
                    raise
                self._foreign.add(refused.field)
        raise AssertionError("the last try returns or raises")

    def _count(self) -> None:
        self._pace.wait()
        with self._lock:
            if self._pace.stopped or (self.budget is not None and self.num_sent >= self.budget):
                raise BudgetSpent
            self.num_sent += 1

    def _wait(self, failed: _Again, number: int) -> None:
        seconds = failed.wait_seconds
        if seconds is None:
            seconds = (
                self.backoff_seconds * 2**number * random.uniform(0.75, 1.25)
            )  # so that threads do not march in step
        if seconds > LONGEST_WAIT_SECONDS:
            raise UserError(
                f"the judge at {self.url} asks you to wait {seconds:,.0f} s ({failed}): what is done is kept; run "
                "the same command again after that"
            ) from failed
        self.tell(f"{failed}: waiting {seconds:.0f} s")
        self._pace.pause(seconds)

    def _try(self, body: Mapping[str, Any]) -> dict[str, Any]:
        foreign = self._foreign & body.keys()
        kept = {name: value for name, value in body.items() if name not in foreign}
        new = {other: body[name] for name, other in REPLACED.items() if other and name in foreign}
        try:
            answer = self._client.post(f"{self.url}/chat/completions", json={"model": self.model, **kept, **new})
        except self._http.TimeoutException as error:
            raise _Again(f"no answer in time, {type(error).__name__}", timed_out=True) from error
        except (self._http.TransportError, self._http.DecodingError) as error:
            if not self._reached:
                raise self._unreachable(error) from error
            raise _Again(f"{type(error).__name__}: {error}") from error
        self._reached = True
        status = answer.status_code
        if status in (401, 403):
            raise self._wrong_key(answer)
        if status in (400, 413, 422):
            refusal = f"the judge at {self.url} refuses the request ({_told(answer)}): change the judge or its options"
            raise RequestRefused(refusal, _field(answer.text))
        if status in (408, 409, 429) or status >= 500:
            raise _Again(_told(answer), _retry_after(answer.headers.get("Retry-After")))
        if status != 200:
            raise UserError(
                f"{self.url}/chat/completions does not exist or has no model {self.model} ({_told(answer)}): correct --judge-url, "
                "which usually ends in /v1, or --judge-model"
            )
        return _completion(answer.text) | {"left_out": sorted(foreign)}

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"no judge can be reached at {self.url} ({type(error).__name__}: {error}): start it, or correct --judge-url"
        )

    def _wrong_key(self, answer: Any) -> UserError:
        return UserError(
            f"the judge at {self.url} does not accept the key, or has none ({_told(answer)}): put the right one into the "
            "environment variable that --judge-key-env names"
        )


class _Pace:
    """When the next request may be sent; all threads share it."""

    def __init__(self, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self._next = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def wait(self) -> None:
        while not self.stopped:
            with self._lock:
                left = self._next - time.monotonic()
                if left <= 0:
                    self._next = time.monotonic() + self.interval_seconds
                    return
            self._stop.wait(left)


def check_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises: UserError if it is not the address of an endpoint, or holds a password.
    """
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018  a port that is no number raises here
    except ValueError as error:
        raise UserError(
            f"--judge-url {url} is not an address ({error}): write it as http://localhost:8000/v1"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--judge-url {url} is not an http address: write it as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"--judge-url {url} holds more than an address: remove the rest, and put the key into an environment variable"
        )
    return url.strip().rstrip("/").removesuffix("/chat/completions")


def check_key(key: str) -> str:
    """``key``, if it can stand in a header; it is not told if it cannot."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the judge's key holds spaces, line breaks or letters that no key has: set it again")
    return key


def _completion(text: str) -> dict[str, Any]:
    """What is wanted of a chat completion; an answer without one is a fault of the server, which may pass."""
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        reply = choice["message"]["content"]
        if reply is not None and not isinstance(reply, str):
            raise TypeError("content is no text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Again(f"status 200, but no chat completion: {one_line(text, 100)!r}") from error
    usage = answer.get("usage")
    return {"reply": reply or "", "finish_reason": str(choice.get("finish_reason")), "usage": usage}


def _told(answer: Any) -> str:
    """Status and what the server says about it, in a few words."""
    return f"status {answer.status_code}: {one_line(' '.join(answer.text.split()), 200)}"


def _field(text: str) -> Any:
    """The field of the request that the server's error is about, where it says so."""
    try:
        field = json.loads(text)["error"]["param"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return field if isinstance(field, str) else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None for anything else.

    Example:
        >>> _retry_after("3"), _retry_after("soon"), _retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
        (3.0, None, 0.0)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
