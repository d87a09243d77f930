"""The page: all that the check found, in one file that needs no other."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from hkd_det.datasets.check.summary import HistogramBin, SplitSummary
from hkd_det.datasets.check.words import list_histograms, make_summary_rows
from hkd_det.files import write_text

TEMPLATE = Path(__file__).with_name("page.html.j2")
MAX_SHOWN, MAX_LISTED = 50, 2000  # faults: in sight, and on the page at all


@dataclass(frozen=True)
class SplitReport:
    """A split. sheet_jpg: the contact sheet as a JPEG file's bytes, empty if no picture can be read."""

    summary: SplitSummary
    contact_sheet_jpg: bytes

    @property
    def summary_rows(self) -> list[tuple[str, str]]:
        return make_summary_rows(self.summary)

    @property
    def histograms(self) -> list[tuple[str, list[tuple[HistogramBin, float]]]]:
        """Titles, and bars with their lengths in percent of the longest."""
        return [
            (title, [(bar, 100 * bar.count / max(1, *(one.count for one in bars))) for bar in bars])
            for title, bars in list_histograms(self.summary)
        ]

    @property
    def contact_sheet_uri(self) -> str:
        """A data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.contact_sheet_jpg).decode("ascii")


def write_dataset_report(path: Path, data: str, reports: Sequence[SplitReport], errors: Sequence[str]) -> None:
    """In one step."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown, more = errors[:MAX_SHOWN], errors[MAX_SHOWN:MAX_LISTED]
    left = len(errors) - len(shown) - len(more)
    write_text(path, template.render(data=data, parts=reports, count=len(errors), shown=shown, more=more, left=left))
