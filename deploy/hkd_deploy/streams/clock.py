"""Capture time of the frames of a network stream.

Where the sender states its clock (RTCP sender reports), the age of a frame is the clock of this machine minus that of
the sender. Otherwise the timestamps of the stream show how much later than the fastest frame a frame arrives, so that a
growing backlog is visible; the constant part of the delay is unknown and counts as 0.
"""

MAX_SENDER_AGE_S = 60.0  # a larger age, or a frame from the future, means that the clocks are not synchronized
CLOCK_TOLERANCE_S = 0.05
MAX_DRIFT = 2e-4  # relative error of the quartz of a camera, seconds per second
MAX_JUMP_S = 1.0  # timestamps that move by more than the time that passed were reset


class StreamClock:
    """Estimates when each frame of one connection was captured."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # timestamp and arrival of the last frame
        self._lag_s = 0.0

    def estimate_age_s(self, timestamp_s: float | None, arrival_s: float, sender_age_s: float | None = None) -> float:
        """Estimate the age of a frame at its arrival.

        Args:
            timestamp_s: Presentation timestamp, seconds. None if the stream has none.
            arrival_s: Time of arrival by a monotonic clock, seconds.
            sender_age_s: Wall-clock time of this machine at the arrival minus capture time stated by the sender, or
                None.

        Returns:
            The age in seconds, at least 0.
        """
        lag_s = 0.0 if timestamp_s is None else self._measure_lag_s(timestamp_s, arrival_s)
        if sender_age_s is not None and -CLOCK_TOLERANCE_S <= sender_age_s <= MAX_SENDER_AGE_S:
            return max(0.0, sender_age_s)
        return lag_s

    def _measure_lag_s(self, timestamp_s: float, arrival_s: float) -> float:
        """Return how much later the frame arrives than the fastest frame of the connection."""
        if self._last is not None:
            passed_s, step_s = arrival_s - self._last[1], timestamp_s - self._last[0]
            lag_s = self._lag_s + passed_s - step_s - MAX_DRIFT * passed_s
            # A timestamp that steps back, or ahead of what the lag explains, was reset: the lag stays as it was.
            # A pause of the network is a long time with a small step.
            if step_s > -MAX_JUMP_S and lag_s > -MAX_JUMP_S:
                self._lag_s = max(0.0, lag_s)
        self._last = (timestamp_s, arrival_s)
        return self._lag_s
