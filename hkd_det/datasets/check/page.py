"""The page: all that the check found, in one file that needs no other."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from hkd_det.datasets.check.summary import Bar, Summary
from hkd_det.datasets.check.words import facts, histograms
from hkd_det.files import write_text

TEMPLATE = Path(__file__).with_name("page.html.j2")
MOST_SHOWN, MOST_LISTED = 50, 2000  # faults: in sight, and on the page at all


@dataclass(frozen=True)
class Part:
    """A split. sheet_jpg: the contact sheet as a JPEG file's bytes, empty if no picture can be read."""

    summary: Summary
    sheet_jpg: bytes

    @property
    def facts(self) -> list[tuple[str, str]]:
        return facts(self.summary)

    @property
    def histograms(self) -> list[tuple[str, list[tuple[Bar, float]]]]:
        """Titles, and bars with their lengths in percent of the longest."""
        return [
            (title, [(bar, 100 * bar.count / max(1, *(one.count for one in bars))) for bar in bars])
            for title, bars in histograms(self.summary)
        ]

    @property
    def sheet(self) -> str:
        """A data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.sheet_jpg).decode("ascii")


def write_page(path: Path, data: str, parts: Sequence[Part], faults: Sequence[str]) -> None:
    """In one step."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown, more = faults[:MOST_SHOWN], faults[MOST_SHOWN:MOST_LISTED]
    left = len(faults) - len(shown) - len(more)
    write_text(path, template.render(data=data, parts=parts, count=len(faults), shown=shown, more=more, left=left))
