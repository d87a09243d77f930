"""Output of commands: progress of long operations, and text tables.

Progress is shown as bars on a terminal and as time-stamped lines elsewhere (log files, services, notebooks). The
optional packages `tqdm` and `tabulate` are imported on use.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from hkd_det.errors import import_package

Item = TypeVar("Item")

LINE_INTERVAL_S = 60.0


def is_terminal() -> bool:
    """Return whether progress bars can be drawn: stderr is a terminal."""
    return sys.stderr.isatty()


def log_line(text: str) -> None:
    """Print one line to stdout: above the bars of a terminal, otherwise with the time of day in front.

    Args:
        text: The line.
    """
    if is_terminal():
        import_package("tqdm").tqdm.write(text)
    else:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def log_stage(text: str) -> None:
    """Print the start of a stage of a command, if there is no terminal whose bars show it.

    Args:
        text: The line.
    """
    if not is_terminal():
        log_line(text)


def format_duration(seconds: float) -> str:
    """Format a duration as "2:05" (minutes and seconds) or "1:02:05".

    Args:
        seconds: Duration in seconds.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes in MiB.

    Args:
        num_bytes: Number of bytes.
    """
    return f"{num_bytes / 2**20:,.1f} MiB"


class Progress:
    """Progress of one operation, as a context manager.

    Args:
        total: Number of units; 0 if it is unknown.
        label: Name of the operation.
        unit: Name of one unit, singular; "B" for bytes, "%" for percent, which have no time left.
        initial: Units that an earlier session has finished.
        is_enabled: False shows nothing, as in all processes but the first.
        delay_s: Time until the bar appears, seconds.
        keep: Whether the bar stays on the terminal at the end.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        initial: int = 0,
        is_enabled: bool = True,
        delay_s: float = 0.0,
        keep: bool = False,
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.initial, self.done = float(initial), float(initial)
        self.status = ""
        self._has_lines = is_enabled and not is_terminal()
        self._start_s = self._line_s = time.monotonic()
        self._bar: Any = None
        if is_enabled and is_terminal():
            tqdm = import_package("tqdm").tqdm
            options: dict[str, Any] = {"unit": unit}
            if unit == "B":
                options.update(unit_scale=True, unit_divisor=1024)
            elif unit == "%":
                options["bar_format"] = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            # smoothing=0: the time left follows from the mean speed, which includes pauses for validation.
            self._bar = tqdm(
                total=total or None, initial=initial, desc=label, leave=keep, delay=delay_s, smoothing=0, **options
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def set_label(self, label: str) -> None:
        """Change the name of the operation.

        Args:
            label: New name.
        """
        self.label = label
        if self._bar is not None:
            self._bar.set_description(label)

    def set_status(self, text: str, refresh: bool = True) -> None:
        """Show a text next to the bar or at the end of the lines.

        Args:
            text: The text; empty removes it.
            refresh: False draws it with the next update only.
        """
        self.status = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=refresh)

    def restart(self, done: float) -> None:
        """Set the number of finished units, which can decrease, as for a download that starts again.

        Args:
            done: New number. The time left is computed from here.
        """
        self.initial = self.done = done
        self._start_s = time.monotonic()
        if self._bar is not None:
            self._bar.n = self._bar.last_print_n = done

    def update(self, count: float = 1, values: Mapping[str, float] | None = None) -> None:
        """Count finished units.

        Args:
            count: Number of units since the last call.
            values: Values to show next to the bar or in the line.
        """
        self.done += count
        texts = {name: f"{value:.2f}" for name, value in (values or {}).items()}
        if self._bar is not None:
            if texts:
                self._bar.set_postfix(texts, refresh=False)
            self._bar.update(count)
        elif self._has_lines and (now_s := time.monotonic()) - self._line_s >= LINE_INTERVAL_S:
            self._line_s = now_s
            suffix = "".join(f"  {name} {text}" for name, text in texts.items())
            suffix += f"  {self.status}" if self.status else ""
            log_line(f"{self.label}: {self._format_done()}{self._format_time_left(now_s)}{suffix}")

    def _format_done(self) -> str:
        if self.unit == "%":
            return f"{self.done:.0f} %"
        format_count = format_bytes if self.unit == "B" else "{:.0f}".format
        counts = [self.done, self.total] if self.total else [self.done]
        return "/".join(map(format_count, counts)) + ("" if self.unit == "B" else f" {self.unit}s")

    def _format_time_left(self, now_s: float) -> str:
        if not self.total or self.unit == "%":
            return ""
        seconds_per_unit = (now_s - self._start_s) / max(1, self.done - self.initial)
        return f", {format_duration(seconds_per_unit * (self.total - self.done))} left"


def iterate_with_progress(
    items: Iterable[Item], total: int, label: str, unit: str, delay_s: float = 0.0
) -> Iterator[Item]:
    """Iterate over items and show the progress.

    Args:
        items: Items to iterate over.
        total: Number of items; 0 if it is unknown.
        label: Name of the operation.
        unit: Name of one item, singular.
        delay_s: Time until the bar appears, seconds.

    Yields:
        The items.
    """
    with Progress(total, label, unit, delay_s=delay_s) as progress:
        for item in items:
            yield item
            progress.update()


def format_table(
    rows: Sequence[Sequence[str]],
    headers: Sequence[str] = (),
    style: str = "plain",
    left_columns: int = 1,
    align: Sequence[str] | None = None,
) -> str:
    """Format rows as a table with aligned columns.

    Args:
        rows: Cells of each row, as text. All rows have the same length.
        headers: Titles of the columns.
        style: Table format of the package tabulate: `plain` for the terminal, `github` for Markdown.
        left_columns: Number of columns that are aligned to the left; the others are aligned to the right.
        align: `left` or `right` for each column, instead of `left_columns`.

    Returns:
        The table, without trailing spaces and line break.

    Raises:
        UnavailableError: The package tabulate is not installed.
    """
    tabulate = import_package("tabulate").tabulate
    if style == "plain" and headers:  # as a row: tabulate widens the columns below a header
        rows, headers = [headers, *rows], ()
    num_columns = max((len(row) for row in (headers, *rows)), default=0)
    align = align or tuple("left" if column < left_columns else "right" for column in range(num_columns))
    table = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align if rows else None)
    return "\n".join(line.rstrip() for line in table.splitlines())
