"""What the terminal and the page say of a split."""

from collections.abc import Sequence

from hkd_det.datasets.check.summary import Bar, Spread, Summary

MOST_NAMED = 8  # labels, sizes
BAR_WIDTH = 40
LONGEST = 600  # letters of a fault


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Names and values."""
    unreadable = f", {summary.unreadable:,} that can't be read" if summary.unreadable else ""
    sides = [("width", summary.width), ("height", summary.height)] if len(summary.sizes) > 1 else []
    return [
        ("pictures", f"{summary.pictures:,}; {summary.empty:,} without people to be found{unreadable}"),
        ("people to be found", f"{summary.people:,}"),
        ("ignore regions", f"{summary.regions:,}"),
        ("labels", _listed(summary.labels)),
        ("picture sizes", _listed(summary.sizes)),
        *((f"picture {side}", _told(spread)) for side, spread in sides if spread),
    ]


def text(summary: Summary) -> str:
    """For the terminal: the facts, and the histograms as bars."""
    lines = [summary.split, *(f"  {name:<20}{value}" for name, value in facts(summary))]
    for title, bars in histograms(summary):
        lines += [f"  {title}", *_drawn(bars)]
    return "\n".join(lines)


def histograms(summary: Summary) -> list[tuple[str, tuple[Bar, ...]]]:
    """Titles and bars; none where there is nobody."""
    if not summary.people:
        return []
    return [
        ("height of the people to be found", summary.heights),
        ("visible share of the people to be found", summary.visibilities),
    ]


def printable(line: str) -> str:
    """One line that any terminal and file takes: annotations hold what they like, such as half a surrogate pair."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line[:LONGEST])
    return shown + ("..." if len(line) > LONGEST else "")


def _listed(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{printable(name)}: {count:,}" for name, count in counts[:MOST_NAMED])
    return (named or "none") + (f", and {len(counts) - MOST_NAMED:,} others" if len(counts) > MOST_NAMED else "")


def _told(spread: Spread) -> str:
    return f"{spread.least} to {spread.most} px, median {spread.median:g}"


def _drawn(bars: Sequence[Bar]) -> list[str]:
    most = max(1, *(bar.count for bar in bars))
    return [f"    {bar.label:<16}{bar.count:>10,} {'#' * -(-BAR_WIDTH * bar.count // most)}".rstrip() for bar in bars]
