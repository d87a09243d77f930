"""The demo as a service: signals that end or reload it, its state for systemd, and a file for health checks."""

import math
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType

STATUS_INTERVAL_S = 10.0
HEARTBEAT_INTERVAL_S = 5.0


class StopSignals:
    """Handler of SIGINT, SIGTERM and SIGHUP, which end a run.

    A signal raises KeyboardInterrupt, except in a block of `defer`, which ends between two frames: a file is not
    interrupted in the middle of a frame. A second signal always raises.
    """

    def __init__(self) -> None:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
        self._numbers = [getattr(signal, name) for name in names]
        self._is_deferred = self._is_requested = False

    def __enter__(self) -> "StopSignals":
        self._previous = [signal.signal(number, self._handle) for number in self._numbers]
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in zip(self._numbers, self._previous, strict=True):
            signal.signal(number, handler)

    def is_requested(self) -> bool:
        """Return whether a signal arrived."""
        return self._is_requested

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Defer the KeyboardInterrupt of a signal to the end of the block, which checks `is_requested`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self._is_requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - of signal.signal
        if self._is_requested or not self._is_deferred:
            raise KeyboardInterrupt
        self._is_requested = True


class ReloadSignal:
    """Handler of SIGUSR1, which requests that a run reads its configuration again.

    SIGHUP, which many services use, is what a terminal sends when it is closed: it ends the run.
    """

    def __init__(self) -> None:
        self._number = getattr(signal, "SIGUSR1", None)  # not on Windows
        self._is_requested = False

    def __enter__(self) -> "ReloadSignal":
        if self._number is not None:
            self._previous = signal.signal(self._number, self._handle)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._number is not None:
            signal.signal(self._number, self._previous)

    def take(self) -> bool:
        """Return whether a signal arrived since the last call. Several signals are one request."""
        is_requested, self._is_requested = self._is_requested, False
        return is_requested

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - of signal.signal
        self._is_requested = True


class SystemdNotifier:
    """Reports the state of the service to systemd over its socket (sd_notify), if there is one.

    `READY=1` is sent with the first processed frame. Then `WATCHDOG=1` is sent twice per interval of the watchdog, so
    that systemd restarts a service whose loop does not run.

    Args:
        environment: Environment variables: `NOTIFY_SOCKET`, and `WATCHDOG_USEC` with a watchdog.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # @: an abstract name
        self._watchdog_s = int(environment.get("WATCHDOG_USEC", "0")) / 1e6
        self._is_ready = False
        self._watchdog_sent_s = self._status_sent_s = -math.inf

    def update(self, num_frames: int, format_status: Callable[[], str]) -> None:
        """Report the state. Call it at least ten times per second.

        Args:
            num_frames: Number of processed frames.
            format_status: Returns one line for `systemctl status`. It is called every 10 s.
        """
        if not self._address:
            return
        now_s, messages = monotonic(), []
        if num_frames and not self._is_ready:
            self._is_ready = True
            messages.append("READY=1")
        if self._is_ready and self._watchdog_s and now_s - self._watchdog_sent_s >= self._watchdog_s / 2:
            self._watchdog_sent_s = now_s
            messages.append("WATCHDOG=1")
        if now_s - self._status_sent_s >= STATUS_INTERVAL_S:
            self._status_sent_s = now_s
            messages.append(f"STATUS={format_status()}")
        if messages:
            self._send("\n".join(messages))

    def close(self) -> None:
        """Report that the service ends."""
        if self._address:
            self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection, suppress(OSError):
            connection.sendto(message.encode(), self._address)


class Heartbeat:
    """A file whose modification time shows that the loop runs, for the health check of a container.

    Args:
        path: The file. It is created.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._updated_s = monotonic()
        path.touch()

    def update(self) -> None:
        """Update the modification time, at most every 5 s."""
        if monotonic() - self._updated_s >= HEARTBEAT_INTERVAL_S:
            self._updated_s = monotonic()
            with suppress(OSError):  # the health check reports it
                self._path.touch()
