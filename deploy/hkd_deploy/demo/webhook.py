"""Delivery of events to a web server: `hkd-demo --webhook URL`.

The retry is a loop around urllib: urllib3's `Retry` gives up after a number of attempts and sleeps where a signal to
stop does not reach it.
"""

import base64
import http.client
import json
import urllib.error
import urllib.request
from email.message import Message
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hkd_deploy.demo.delivery import (
    DEFAULT_EVERY_S,
    FLUSH_S,
    MAX_BUFFERED,
    MAX_RETRY_S,
    EventPublisher,
    Report,
    describe_network_error,
    parse_address,
)
from hkd_det import __version__

WEBHOOK_VERSION = 1
MAX_BATCH = 100  # events per request
REQUEST_TIMEOUT_S = 10.0
REFUSED_CONTENT = (400, 413, 415, 422)  # the same content is refused again


class WebhookPublisher(EventPublisher):
    """Posts events to a web server as JSON: `{"version": 1, "events": [...]}`.

    Args:
        url: http:// or https:// URL. User and password in it are sent by Basic authentication.
        report: Called with one line for each change of the connection.
        every_s: Longest time between two frames of a camera that are sent, seconds. 0 sends every frame.
        interval_s: Least time between two requests, seconds.
        max_buffered: Capacity of the buffer, events.
        timeout_s: Limit for one request, seconds.

    Raises:
        UsageError: The URL is invalid.
    """

    def __init__(
        self,
        url: str,
        report: Report,
        every_s: float = DEFAULT_EVERY_S,
        interval_s: float = 1.0,
        max_buffered: int = MAX_BUFFERED,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        parts = parse_address("--webhook", url, {"http": 80, "https": 443})
        # The path is often the secret of a webhook, so the name is the host only.
        super().__init__(f"webhook {parts.scheme}://{parts.hostname}:{parts.port}", report, every_s, max_buffered)
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._url = urlunsplit(urlsplit(url)._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        self._headers = {"Content-Type": "application/json", "User-Agent": f"hkd-demo/{__version__}"}
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._sent: list[dict[str, Any]] = []
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sent = self._sent or self._buffer.take(MAX_BATCH, timeout_s=0.2)
            if not self._sent:
                continue
            problem, delay_s = self._post(self._timeout_s)
            self._set_problem(problem)
            if problem:
                self._wait_before_retry(delay_s, self._interval_s)
            else:
                self._stop.wait(self._interval_s)
        end_s = monotonic() + FLUSH_S
        while (remaining_s := end_s - monotonic()) > 0 and not self._state[0]:
            self._sent = self._sent or self._buffer.take(MAX_BATCH)
            if not self._sent:
                return
            self._set_problem(self._post(remaining_s)[0])

    def _post(self, timeout_s: float) -> tuple[str, float]:
        """Send the batch. Return the problem, and the delay that the server asks for, seconds, or 0."""
        body = json.dumps({"version": WEBHOOK_VERSION, "events": self._sent}).encode()
        request = urllib.request.Request(self._url, body, self._headers)
        try:
            with self._opener.open(request, timeout=timeout_s):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in REFUSED_CONTENT:
                self._num_refused += len(self._sent)
                self._sent = []
            return describe_http_status(error.code), _parse_delay(error.headers)
        except (urllib.error.URLError, OSError, http.client.HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return describe_network_error(reason), 0.0
        self.num_delivered += len(self._sent)
        self._sent = []
        return "", 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Reports redirections as errors: urllib follows them with GET, which loses the body."""

    def redirect_request(self, *args: Any) -> None:  # noqa: ARG002 - interface of urllib
        return None


def describe_http_status(code: int) -> str:
    """Describe the status of a failed request.

    Args:
        code: Status code, 300 to 599.

    Returns:
        The problem and the remedy.
    """
    if 300 <= code < 400:
        return f"the server redirects (status {code}). Set the URL to the new address."
    if code in REFUSED_CONTENT:
        return f"the server refuses the content (status {code}). Its log states why."
    if code in (401, 403):
        return f"the server refuses user, password or token (status {code}). Check the URL."
    if code in (404, 405, 410):
        return f"the server accepts nothing at this path (status {code}). Check the URL."
    return f"the server reports an error (status {code}). Events are kept and sent again."


def _parse_delay(headers: Message) -> float:
    """Return the value of Retry-After in seconds, at most the longest delay. 0 if there is none."""
    text = headers.get("Retry-After", "").strip()
    return min(float(text), MAX_RETRY_S) if text.isascii() and text.isdigit() else 0.0
