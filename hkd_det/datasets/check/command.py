"""The check itself: read, decode, count, draw, tell."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from hkd_det.datasets.catalogue import open_data, splits_of
from hkd_det.datasets.check.drawings import contact_sheet, histograms, write_figure, write_picture
from hkd_det.datasets.check.pictures import decode_all
from hkd_det.datasets.check.summary import Bar, Summary, summarise
from hkd_det.datasets.sample import Sample
from hkd_det.errors import DataError
from hkd_det.files import write_text

TEMPLATE = Path(__file__).with_name("page.html.j2")
MOST_TOLD = 50  # faults on the terminal and on the page; all stand in faults.txt
MOST_NAMED = 8  # labels, sizes
BAR_WIDTH = 40


@dataclass(frozen=True)
class Part:
    """A split on the page; pictures as data URIs."""

    summary: Summary
    rows: list[tuple[str, str]]
    histograms: str
    sheet: str


def check(data: str, folder: Path) -> int:
    """Check every split of a data set; prints the result, writes `index.html` and its pictures into the folder.

    Returns 0, or 1 if anything is wrong. Raises UsageError for a data set or key that there is not.
    """
    faults: list[str] = []
    parts = [_part(data, split, folder, faults) for split in splits_of(data)]
    told = list(dict.fromkeys(faults))
    write_text(folder / "faults.txt", "".join(f"{fault}\n" for fault in told))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(data=data, faults=told, most=MOST_TOLD, parts=parts)
    write_text(folder / "index.html", page)
    print(f"\n{len(told):,} faults" if told else "\nno faults")
    for fault in told[:MOST_TOLD]:
        print(f"  {fault}")
    if len(told) > MOST_TOLD:
        print(f"  ... and {len(told) - MOST_TOLD:,} more: {folder / 'faults.txt'}")
    print(f"saved {folder / 'index.html'}")
    return 1 if told else 0


def _part(data: str, split: str, folder: Path, faults: list[str]) -> Part:
    def note(fault: DataError) -> None:
        faults.append(f"{split}: {fault}")

    samples: list[Sample] = []
    try:
        samples = open_data(data, split, note)
    except DataError as fault:  # not a record but a file, or nothing is left
        note(fault)
    sizes = decode_all(samples, note)
    summary = summarise(split, samples, sizes)
    print(_text(summary))
    plot, sheet = folder / f"{split}_histograms.png", folder / f"{split}_pictures.jpg"
    write_figure(plot, histograms(summary))
    readable = [sample for sample, size in zip(samples, sizes, strict=True) if size]
    if readable:
        write_picture(sheet, contact_sheet(readable))
    return Part(summary, _rows(summary), _uri(plot, "png"), _uri(sheet, "jpeg") if readable else "")


def _rows(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("pictures", f"{summary.pictures:,}, {summary.empty:,} of them without people to be found"),
        ("people to be found", f"{summary.people:,}"),
        ("ignore regions", f"{summary.regions:,}"),
        ("labels", _listed(summary.labels)),
        ("picture sizes", _listed(summary.sizes)),
    ]


def _listed(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{name}: {count:,}" for name, count in counts[:MOST_NAMED])
    return (named or "none") + (f", and {len(counts) - MOST_NAMED} others" if len(counts) > MOST_NAMED else "")


def _text(summary: Summary) -> str:
    rows = [f"  {name:<20}{value}" for name, value in _rows(summary)]
    heights, visible = (
        _bars(title, bars) for title, bars in (("height", summary.heights), ("visible", summary.visibilities))
    )
    return "\n".join([f"{summary.split}", *rows, *heights, *visible])


def _bars(title: str, bars: Sequence[Bar]) -> list[str]:
    most = max(1, *(bar.count for bar in bars))
    return [f"  {title}"] + [
        f"    {bar.label:<16}{bar.count:>8,} {'#' * -(-BAR_WIDTH * bar.count // most)}" for bar in bars
    ]


def _uri(path: Path, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
