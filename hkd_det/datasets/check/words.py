"""What the terminal and the page say of a split."""

from collections.abc import Sequence

from hkd_det.datasets.check.summary import HistogramBin, Range, SplitSummary

MAX_NAMED = 8  # labels, sizes
BAR_WIDTH = 40
MAX_LINE_LENGTH = 600  # letters of a fault


def make_summary_rows(summary: SplitSummary) -> list[tuple[str, str]]:
    """Names and values."""
    unreadable = f", {summary.num_unreadable:,} that can't be read" if summary.num_unreadable else ""
    sides = [("width", summary.width_range), ("height", summary.height_range)] if len(summary.size_counts) > 1 else []
    return [
        ("pictures", f"{summary.num_images:,}; {summary.num_empty:,} without people to be found{unreadable}"),
        ("people to be found", f"{summary.num_gt:,}"),
        ("ignore regions", f"{summary.num_ignore_regions:,}"),
        ("labels", _format_most_common(summary.label_counts)),
        ("picture sizes", _format_most_common(summary.size_counts)),
        *((f"picture {side}", _format_size_range(spread)) for side, spread in sides if spread),
    ]


def format_summary(summary: SplitSummary) -> str:
    """For the terminal: the facts, and the histograms as bars."""
    lines = [summary.split, *(f"  {name:<20}{value}" for name, value in make_summary_rows(summary))]
    for title, bars in list_histograms(summary):
        lines += [f"  {title}", *_format_bars(bars)]
    return "\n".join(lines)


def list_histograms(summary: SplitSummary) -> list[tuple[str, tuple[HistogramBin, ...]]]:
    """Titles and bars; none where there is nobody."""
    if not summary.num_gt:
        return []
    return [
        ("height of the people to be found", summary.height_bins),
        ("visible share of the people to be found", summary.visible_ratio_bins),
    ]


def escape_nonprintable(line: str) -> str:
    """One line that any terminal and file takes: annotations hold what they like, such as half a surrogate pair."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line[:MAX_LINE_LENGTH])
    return shown + ("..." if len(line) > MAX_LINE_LENGTH else "")


def _format_most_common(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{escape_nonprintable(name)}: {count:,}" for name, count in counts[:MAX_NAMED])
    return (named or "none") + (f", and {len(counts) - MAX_NAMED:,} others" if len(counts) > MAX_NAMED else "")


def _format_size_range(value_range: Range) -> str:
    return f"{value_range.min_px} to {value_range.max_px} px, median {value_range.median_px:g}"


def _format_bars(bins: Sequence[HistogramBin]) -> list[str]:
    most = max(1, *(bar.count for bar in bins))
    return [f"    {bar.label:<16}{bar.count:>10,} {'#' * -(-BAR_WIDTH * bar.count // most)}".rstrip() for bar in bins]
