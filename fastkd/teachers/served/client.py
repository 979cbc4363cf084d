"""One server over HTTP: connections that stay open, retries with a back-off, errors by name."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from fastkd.arguments.messages import listed, shown

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between attempts, doubled each time
LONGEST_REFUSAL = 600.0  # seconds of a Retry-After that are waited for
PIECE = 2**16  # bytes read between two looks at the clock
TRANSIENT = (408, 425, 429)  # statuses below 500 that another attempt may cure
MISSING = (404, 405, 501)
WRONG = "validation error"  # said with 500 by servers that mean 422 (llama-cpp-python)


class _Answer(NamedTuple):
    """Of one attempt: what came, or why nothing did and how long to wait at least."""

    found: Any = None
    error: Exception | None = None
    wait: float = 0.0


class Client:
    """Requests to one server; used by several threads, each with a connection of its own.

    Args:
        url: http or https, without the API's own path; a "/v1" at its end is cut off.
        timeout: seconds for an answer, the time to connect included.
        retries: further attempts after a connection that fails, a status of 5xx or 429 (whose
            Retry-After is kept), or half an answer.
        headers: further ones, as {"Authorization": "Bearer ..."}; no message shows them.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, headers: Mapping[str, str] | None
    ) -> None:
        if headers is not None and not (
            isinstance(headers, Mapping)
            and all(isinstance(x, str) for pair in headers.items() for x in pair)
        ):  # no message shows them
            raise TypeError("headers: got something else, expected {name: value} of str, or None")
        self.url, self._where = url, _split(url)
        self.timeout, self.retries = timeout, retries
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._own, self._lock = threading.local(), threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()
        self._draw = random.Random()  # of its own: a run's random numbers stay as they were

    def ask(self, path: str, body: Any = None, *, what: str = "", optional: bool = False) -> Any:
        """The JSON that the server answers to a POST of `body`, or to a GET where it is None.

        Args:
            path, body: of the request.
            what: what is asked, for messages.
            optional: None, at once, where the server has no such path.

        Raises:
            TimeoutError, ConnectionError: what the last attempt met.
            PermissionError, ValueError: a status that no further attempt would change.
        """
        begun, delay, attempt = time.monotonic(), FIRST_DELAY, 0
        request = f"{self.url}: {'GET' if body is None else 'POST'} {path}"
        request += f" ({what})" if what else ""
        while True:
            answer = self._once(path, body, request, optional)
            if answer.error is None:
                return answer.found
            if attempt == self.retries:
                spent = f"{attempt + 1} attempts in {time.monotonic() - begun:.1f} s"
                kind = type(answer.error)
                raise kind(f"{answer.error} (timeout={self.timeout:g} s; {spent})")
            attempt += 1
            # apart from one another, or all threads would come back at the same time
            wait = max(answer.wait, delay * (0.5 + 0.5 * self._draw.random()))
            if self._closed.wait(wait):
                raise ConnectionAbortedError(f"{request}: the teacher was closed")
            delay = min(2 * delay, LONGEST_DELAY)

    def close(self) -> None:
        """Wake whoever waits for an answer; the client is of no further use."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass  # it is down already

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def release(self) -> None:
        """Close the connections, of which no thread has use any more."""
        for connection in self._open:
            connection.close()
        self._open.clear()

    def _once(self, path: str, body: Any, request: str, optional: bool) -> _Answer:
        deadline = time.monotonic() + self.timeout
        try:
            status, headers, data = self._send(path, body, deadline)
        except TimeoutError:
            self._drop()
            got = f"got no answer in {self.timeout:g} s"
            return _Answer(error=TimeoutError(f"{request}: {got}, expected one"))
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            if self._closed.is_set():
                raise ConnectionAbortedError(f"{request}: the teacher was closed") from None
            got = f"got {type(error).__name__} ({error!s:.80})"
            return _Answer(error=ConnectionError(f"{request}: {got}, expected an answer"))
        if optional and status in MISSING:
            return _Answer()
        wrong = status == 500 and WRONG in _said(data)
        if (status >= 500 or status in TRANSIENT) and not wrong:
            got = f"got status {status} ({_said(data)})"
            refused = ConnectionError(f"{request}: {got}, expected 200")
            return _Answer(error=refused, wait=_retry_after(headers.get("Retry-After")))
        if status != 200:
            kind = PermissionError if status in (401, 403) else ValueError
            kinds = ": is it a server of the kind that api= says?"
            hint = kinds if wrong or status in MISSING else ""
            raise kind(f"{request}: got status {status} ({_said(data)}), expected 200{hint}")
        try:
            return _Answer(json.loads(data))
        except ValueError as error:
            self._drop()
            got = f"got {len(data)} bytes that are no JSON ({error!s:.60})"
            return _Answer(error=ConnectionError(f"{request}: {got}, expected a whole answer"))

    def _send(self, path: str, body: Any, deadline: float) -> tuple[int, Any, bytes]:
        """(status, headers, bytes) of one request; again at once where an idle connection died."""
        method = "GET" if body is None else "POST"
        data = None if body is None else json.dumps(body).encode()
        while True:
            connection, used = self._connection()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.timeout = left
            if connection.sock is not None:
                connection.sock.settimeout(left)
            try:
                connection.request(method, self._where.path + path, data, self._headers)
                response = connection.getresponse()
                break
            except (ConnectionError, http.client.BadStatusLine):
                self._drop()  # servers close what has been idle, without a word
                if not used:
                    raise
        parts = []
        while piece := response.read(PIECE):
            parts.append(piece)
            if time.monotonic() > deadline:
                raise TimeoutError
        return response.status, response.headers, b"".join(parts)

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether it has been used."""
        if self._closed.is_set():
            raise ConnectionAbortedError
        found = getattr(self._own, "connection", None)
        if found is not None:
            return found, True
        secure = self._where.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        made = kind(self._where.hostname or "", self._where.port, timeout=self.timeout)
        self._own.connection = made
        with self._lock:
            self._open.add(made)
        return made, False

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        self._own.connection = None
        if connection is not None:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _split(url: Any) -> SplitResult:
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url: got {shown(url)}, expected one like 'http://localhost:8000'")
    if "@" in parts.netloc:  # which every message would show
        raise ValueError("url: got one with a password, expected it in headers=")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return parts._replace(path=path)


def _said(data: bytes) -> str:
    """What a server says of its refusal, in a line."""
    text = data.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        while isinstance(found, dict):
            at = next((x for x in ("error", "message", "detail") if x in found), None)
            if at is None:
                return listed(found)
            found = found[at]
        text = str(found)
    except ValueError:
        pass
    return " ".join(text.split())[:160] or "nothing said"


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After: a number, or a date."""
    try:
        seconds = float(value or 0.0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(value)).timestamp() - time.time()
        except (TypeError, ValueError):
            seconds = 0.0
    return min(seconds, LONGEST_REFUSAL) if seconds > 0 else 0.0
