"""Progress of a run on stderr, and its summary. (tqdm is not installed on a device that only runs a model.)

In a terminal, one line is overwritten. Otherwise, as in a log, each camera has a line with the time: every 10 s in the
first minute, then every minute, and at each change of its status. With `--log-format json`, each line is an object.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TextIO

from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.output import PERCENTILES
from hkd_deploy.demo.run import CameraPipeline

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 10.0
LATER_LOG_INTERVAL_S = 60.0  # after the first minute


def print_message(message: str, camera: str = "", level: str = "info") -> None:  # noqa: ARG001 - of Report
    """Print a line on stderr during a run: over the progress line of a terminal, or with the time in a log.

    Args:
        message: One line.
        camera: Name of the camera that it is about. Empty for none.
        level: `info`, `warning` or `error`; not printed.
    """
    prefix = "\r\x1b[K" if sys.stderr.isatty() else f"{_format_time()} "
    sys.stderr.write(f"{prefix}{f'{camera}: ' if camera else ''}{message}\n")
    sys.stderr.flush()


def print_json_message(message: str, camera: str = "", level: str = "info") -> None:
    """Print a line on stderr as a JSON object with `time`, `level`, `message`, and `camera` if there is one.

    Args:
        message: The message.
        camera: Name of the camera that it is about. Empty for none.
        level: `info`, `warning` or `error`.
    """
    values = {"time": _format_time(), "level": level, "message": message}
    sys.stderr.write(json.dumps(values | ({"camera": camera} if camera else {})) + "\n")
    sys.stderr.flush()


LOG_FORMATS: Mapping[str, Report] = {"text": print_message, "json": print_json_message}


class ProgressReport:
    """Prints the state of the cameras.

    Args:
        pipelines: The cameras.
        max_frames: Maximum number of frames of the run. None for no limit.
        report: Called with each line of a log. The line of a terminal is for `print_message` only.
    """

    def __init__(
        self, pipelines: Sequence[CameraPipeline], max_frames: int | None = None, report: Report = print_message
    ) -> None:
        self._pipelines, self._max_frames = pipelines, max_frames
        self._report, self._is_terminal = report, report is print_message and sys.stderr.isatty()
        self._start_s = perf_counter()
        self._printed_s: dict[str, float] = {}
        self._printed: dict[str, tuple[int, str]] = {}
        self._width = 0

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._print_terminal_line(end="\n")
            return
        for pipeline in self._pipelines:
            if self._printed.get(pipeline.name, (0, ""))[0] != pipeline.stats.num_frames:
                self._print_log_line(pipeline)

    def update(self) -> None:
        """Print the state if it is time, or if the status of a camera changed."""
        now_s = perf_counter()
        if self._is_terminal:
            if now_s - self._printed_s.get("", -TERMINAL_INTERVAL_S) >= TERMINAL_INTERVAL_S:
                self._printed_s[""] = now_s
                self._print_terminal_line(end="")
            return
        interval_s = LOG_INTERVAL_S if now_s - self._start_s < LATER_LOG_INTERVAL_S else LATER_LOG_INTERVAL_S
        for pipeline in self._pipelines:
            num_frames, kind = self._printed.get(pipeline.name, (0, ""))
            is_first = num_frames == 0 and pipeline.stats.num_frames > 0
            is_due = pipeline.name in self._printed_s and now_s - self._printed_s[pipeline.name] >= interval_s
            is_due = is_due and not pipeline.is_removed
            if is_first or is_due or _remove_numbers(pipeline.status) != kind:
                self._print_log_line(pipeline)

    def _print_terminal_line(self, end: str) -> None:
        if not any(pipeline.stats.num_frames or pipeline.status for pipeline in self._pipelines):
            return
        if len(self._pipelines) == 1:
            text = f"{self._pipelines[0].name}: {_format_state(self._pipelines[0], self._max_frames)}"
        else:
            text = format_totals(self._pipelines)
        print(f"\r{text.ljust(self._width)}", end=end, file=sys.stderr, flush=True)  # overwrite the previous text
        self._width = len(text)

    def _print_log_line(self, pipeline: CameraPipeline) -> None:
        self._printed_s[pipeline.name] = perf_counter()
        self._printed[pipeline.name] = (pipeline.stats.num_frames, _remove_numbers(pipeline.status))
        text = _format_state(pipeline, self._max_frames if len(self._pipelines) == 1 else None)
        self._report(text, pipeline.name, "warning" if pipeline.status else "info")


def format_totals(pipelines: Sequence[CameraPipeline]) -> str:
    """Format the state of all cameras as one line.

    Args:
        pipelines: The cameras.

    Returns:
        Frame count, rate and dropped frames of all cameras together, and the first problem.
    """
    pipelines = [pipeline for pipeline in pipelines if not pipeline.is_removed]
    num_dropped = sum(pipeline.source.num_dropped for pipeline in pipelines)
    running = [pipeline for pipeline in pipelines if not pipeline.is_ended and not pipeline.status]
    parts = [f"{sum(pipeline.stats.num_frames for pipeline in pipelines)} frames"]
    parts += [f"{sum(pipeline.stats.recent_fps for pipeline in running):.1f} fps"]
    parts += [f"{num_dropped} dropped"] * (num_dropped > 0)
    problems = [f"{pipeline.name}: {pipeline.status}" for pipeline in pipelines if pipeline.status]
    parts += [f"{len(problems)} with a problem ({text})" for text in problems[:1]]
    count = f"{len(pipelines)} camera{'s' * (len(pipelines) > 1)}"
    return f"{count}: {', '.join(parts)}"


def report_end(pipelines: Sequence[CameraPipeline], paths: Sequence[Path], log_format: str, output: TextIO) -> None:
    """Print the summary of a run and its saved files: as text, or as lines of a log that a program reads.

    Args:
        pipelines: The cameras.
        paths: Saved files.
        log_format: Key of `LOG_FORMATS`.
        output: Text stream for the format `text`.
    """
    if log_format == "text":
        print_summary(pipelines, output)
        for path in paths:
            print(f"saved {path}", file=output)
        return
    report = LOG_FORMATS[log_format]
    _report_summary(pipelines, report)
    for path in paths:
        report(f"saved {path}")


def print_summary(pipelines: Sequence[CameraPipeline], output: TextIO) -> None:
    """Print frame counts, rates and times of a run; nothing if there was no frame.

    Args:
        pipelines: The cameras.
        output: Text stream.
    """
    if not any(pipeline.stats.num_frames for pipeline in pipelines):
        return
    if len(pipelines) == 1:
        print(pipelines[0].stats.format_summary(pipelines[0].source.num_dropped), file=output)
        return
    print(_format_table(pipelines), file=output)


def _report_summary(pipelines: Sequence[CameraPipeline], report: Report) -> None:
    """Report the frame counts, rate and times of each camera that had a frame as a line of a log."""
    for pipeline in pipelines:
        stats = pipeline.stats
        if stats.num_frames:
            parts = [f"{stats.num_frames} frames, {pipeline.source.num_dropped} dropped, {pipeline.num_lost} lost"]
            parts += [f"{stats.mean_fps:.1f} fps"]
            times_ms = zip(PERCENTILES, stats.compute_latencies(), strict=True)
            parts += [f"p{percent} {time_ms:.1f} ms" for percent, time_ms in times_ms]
            report(f"end: {', '.join(parts)}", pipeline.name)


def _format_time() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _format_state(pipeline: CameraPipeline, max_frames: int | None) -> str:
    total = min(filter(None, (pipeline.source.num_frames, max_frames)), default=None)
    stats, num_dropped, status = pipeline.stats, pipeline.source.num_dropped, pipeline.status
    parts = [f"{stats.num_frames}{'' if total is None else f'/{total}'} frames", f"{stats.recent_fps:.1f} fps"]
    parts += [f"{num_dropped} dropped"] * (num_dropped > 0)
    parts += [f"decoded by {pipeline.source.decoder}"] * bool(pipeline.source.decoder)
    return ", ".join(parts + [status] * bool(status))


def _format_table(pipelines: Sequence[CameraPipeline]) -> str:
    """Format one row per camera: counts, rate, and percentiles of the age, or of the time of the model for a video."""
    header = ["frames", "dropped", "lost", "fps", *(f"p{percent} ms" for percent in PERCENTILES)]
    width = max(len(pipeline.name) for pipeline in pipelines)
    lines = [" ".join([f"{'camera':<{width}}", *(f"{title:>8}" for title in header)])]
    for pipeline in pipelines:
        stats = pipeline.stats
        cells = [f"{count:8d}" for count in (stats.num_frames, pipeline.source.num_dropped, pipeline.num_lost)]
        cells += [f"{stats.mean_fps:8.1f}", *(f"{latency_ms:8.1f}" for latency_ms in stats.compute_latencies())]
        lines.append(" ".join([f"{pipeline.name:<{width}}", *cells]))
    return "\n".join([*lines, "p50, p90, p99: time since capture of a camera, otherwise time of the model"])


def _remove_numbers(status: str) -> str:
    """Return a status without its numbers: a later `image unchanged for N s` is not another status."""
    return re.sub(r"\d+", "", status)
