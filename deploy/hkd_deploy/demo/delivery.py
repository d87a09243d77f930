"""Delivery of events to other programs: what is sent, the buffer, and the base class of MQTT and webhook.

A publisher sends in a thread of its own. The thread of the detector only appends to a buffer, so a receiver that is
slow or absent has no effect on it. The buffer is bounded: when it is full, the oldest event is dropped and counted.
Delivery is at least once: an event whose confirmation is lost is sent again.
"""

import http.client
import re
import socket
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sized
from threading import Condition, Event, Lock, Thread
from time import monotonic
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.events import make_count_events, make_frame_event, make_status_event
from hkd_deploy.streams import redact_url
from hkd_deploy.streams.failures import add_password_hint
from hkd_det.errors import UsageError

MAX_BUFFERED = 10_000  # events; with one per second this is an outage of almost three hours
MIN_CHANGE_INTERVAL_S = 0.5  # a person at the threshold would otherwise cause an event with each frame
DEFAULT_EVERY_S = 60.0
MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0
FLUSH_S = 0.8  # for the last events when the program ends
TRUST_HINT = "the certificate of the server is not trusted. Set SSL_CERT_FILE to the certificate of its CA."


class Report(Protocol):
    """Function that writes a line of the log."""

    def __call__(self, message: str, camera: str = "", level: str = "info") -> None:
        """Write a line.

        Args:
            message: One line.
            camera: Name of the camera that it is about. Empty for none.
            level: `info`, `warning` or `error`.
        """


class EventSelector:
    """Selects the events that are sent.

    A `frame` is sent if its number of persons differs from that of the last `frame` that was sent, at most twice per
    second, and without a change after `every_s`. All other events are sent.

    Args:
        every_s: Longest time between two frames of a camera, seconds. 0 sends every frame.
    """

    def __init__(self, every_s: float = DEFAULT_EVERY_S) -> None:
        self._every_s = every_s
        self._sent: dict[str, tuple[float, int]] = {}  # time and number of persons by camera

    def select(self, event: dict[str, Any], now_s: float) -> bool:
        """Return whether an event is to be sent.

        Args:
            event: Event, as written by `--events`.
            now_s: Time by a monotonic clock, seconds.
        """
        if event["event"] != "frame":
            return True
        camera, num_persons = event["camera"], event["num_persons"]
        if camera in self._sent:
            sent_s, sent_persons = self._sent[camera]
            has_changed = num_persons != sent_persons and now_s - sent_s >= MIN_CHANGE_INTERVAL_S
            if not has_changed and now_s - sent_s < self._every_s:
                return False
        self._sent[camera] = (now_s, num_persons)
        return True


class EventBuffer:
    """A queue of events between two threads that drops the oldest one when it is full.

    Args:
        max_events: Capacity.

    Attributes:
        num_dropped: Number of dropped events.
    """

    def __init__(self, max_events: int) -> None:
        self._events: deque[dict[str, Any]] = deque()
        self._max_events = max_events
        self._condition = Condition()
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: dict[str, Any]) -> None:
        """Append an event.

        Args:
            event: The event.
        """
        with self._condition:
            if len(self._events) >= self._max_events:
                self._events.popleft()
                self.num_dropped += 1
            self._events.append(event)
            self._condition.notify()

    def take(self, max_events: int, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        """Remove and return the oldest events.

        Args:
            max_events: Maximum number.
            timeout_s: Time to wait for the first one, seconds.

        Returns:
            The events. Empty after the timeout.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._events, timeout_s)
            return [self._events.popleft() for _ in range(min(max_events, len(self._events)))]


class EventPublisher(ABC):
    """Sends events to a receiver in a thread. It is a `FrameSink` for any number of cameras.

    Args:
        name: Name of the receiver in messages, without credentials.
        report: Called with one line for each change of the connection.
        every_s: Longest time between two frames of a camera that are sent, seconds. 0 sends every frame.
        max_buffered: Capacity of the buffer, events.

    Attributes:
        name: Name of the receiver.
        num_delivered: Number of events that the receiver has confirmed.
    """

    def __init__(
        self, name: str, report: Report, every_s: float = DEFAULT_EVERY_S, max_buffered: int = MAX_BUFFERED
    ) -> None:
        self.name = name
        self.num_delivered = 0
        self._buffer = EventBuffer(max_buffered)
        self._sent: Sized = ()  # events taken from the buffer that the receiver has not confirmed
        self._retry_s = MIN_RETRY_S
        self._num_refused = 0
        self._cameras: set[str] = set()  # with a published status
        self._selector, self._selector_lock = EventSelector(every_s), Lock()
        self._report, self._state = report, ("not connected yet", False)
        self._num_reported = 0  # dropped events that a message has stated
        self._stop = Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)

    @property
    def num_dropped(self) -> int:
        """Number of events that were not delivered and are not in the buffer anymore."""
        return self._buffer.num_dropped + self._num_refused

    @property
    def num_waiting(self) -> int:
        """Number of events that are not delivered yet."""
        return len(self._buffer) + len(self._sent)

    def publish(self, event: dict[str, Any]) -> None:
        """Append an event to the buffer if it is worth a message. It never waits for the receiver.

        Args:
            event: Event, as written by `--events`.
        """
        with self._selector_lock:
            is_selected = self._selector.select(event, monotonic())
        if is_selected:
            self._buffer.put(event)

    def write(self, result: FrameResult) -> None:
        """Publish the detections of a frame, and what was counted; see `FrameSink.write`."""
        if result.camera not in self._cameras:
            self.write_status(result.camera, result.status)  # a receiver has no other sign that all is well
        for event in (make_frame_event(result), *make_count_events(result)):
            self.publish(event)

    def write_status(self, camera: str, status: str) -> None:
        """Publish the status of a camera; see `FrameSink.write_status`."""
        self._cameras.add(camera)
        self.publish(make_status_event(camera, status))

    def close(self) -> None:
        """Send what is in the buffer, for less than a second, and stop the thread. Lost events are reported."""
        self._stop.set()
        self._thread.join(FLUSH_S + 0.2)
        if self.num_waiting or self.num_dropped:
            lost = f"{self.num_delivered} delivered, {self.num_waiting} not delivered, {self.num_dropped} dropped."
            self._report(f"{self.name}: events: {lost}", level="warning")

    @abstractmethod
    def _run(self) -> None:
        """Body of the thread: send until `_stop` is set, then flush."""

    def _set_problem(self, problem: str) -> None:
        """Report the state of the connection if it changed. An empty text means that the receiver accepts events."""
        if not problem:
            self._retry_s = MIN_RETRY_S
        num_dropped = self.num_dropped - self._num_reported
        state = (problem, num_dropped > 0)
        if state == self._state or (not problem and not self._state[0]):
            return
        text = problem or "connected."
        if num_dropped:
            text += " The buffer is full: the oldest events are dropped." if problem else f" {num_dropped} dropped."
        self._report(f"{self.name}: {text}", level="warning" if problem else "info")
        self._state = state
        if not problem:
            self._num_reported, self._state = self.num_dropped, ("", False)

    def _wait_before_retry(self, delay_s: float = 0.0, min_s: float = 0.0) -> None:
        """Wait after a failure, twice as long as after the last one, until `_stop` is set.

        Args:
            delay_s: Time that the receiver asks for, seconds. 0 for none.
            min_s: Least time, seconds.
        """
        end_s = monotonic() + max(min_s, delay_s or self._retry_s)
        while not self._stop.wait(min(0.5, max(0.0, end_s - monotonic()))) and monotonic() < end_s:
            self._set_problem(self._state[0])  # states events that the full buffer drops
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)


def parse_address(flag: str, address: str, default_ports: dict[str, int]) -> SplitResult:
    """Check the URL of a receiver.

    Args:
        flag: Flag for messages.
        address: URL.
        default_ports: Default port of each supported scheme.

    Returns:
        Its parts, with a port.

    Raises:
        UsageError: The scheme is not supported, or host or port are missing or invalid.
    """
    name, schemes = redact_url(address), ", ".join(f"{scheme}://" for scheme in default_ports)
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        message = f"{flag} {name}: the URL is invalid. Check host and port."
        raise UsageError(add_password_hint(message, address)) from None
    if parts.scheme not in default_ports or not parts.hostname or re.search(r"[\s\0-\x1f]", address):
        raise UsageError(f"{flag} {name}: expected a URL without spaces that begins with {schemes} and a host.")
    if port is None:
        parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{default_ports[parts.scheme]}")
    return parts


def describe_network_error(error: object) -> str:
    """Describe why a receiver cannot be reached.

    Args:
        error: Exception or text.

    Returns:
        The problem and the remedy.
    """
    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        ((socket.gaierror, UnicodeError), "unknown host. Check the name."),
        (ConnectionRefusedError, "nothing listens at this port. Check that the receiver runs; events are kept."),
        (TimeoutError, "no answer within the time limit. Check that the receiver is reachable; events are kept."),
        (ssl.SSLCertVerificationError, TRUST_HINT),
        (ssl.SSLError, "no TLS connection. Check scheme and port."),
        ((ConnectionError, EOFError, http.client.HTTPException), "the connection was closed. Events are kept."),
    ]
    for classes, text in kinds:
        if isinstance(error, classes):
            return text
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return f"unreachable ({reason}). Check the network; events are kept."
