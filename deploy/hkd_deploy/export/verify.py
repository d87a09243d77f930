"""Verification: every exported form of a detector against what it was made of, on real pictures. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hkd_deploy.backends.opening import open_backend
from hkd_deploy.export.parity import SURE, Parity, ParityError, Run, Seen, compare, look
from hkd_deploy.export.reference import Reference
from hkd_deploy.precision.judge import detect_all
from hkd_det.datasets.sample import Sample
from hkd_det.detections import Detections
from hkd_det.errors import DataError, HkdError
from hkd_det.metrics.citypersons import REASONABLE, evaluate
from hkd_det.metrics.curve import ABSENT
from hkd_det.metrics.tables import DetectionTable, TruthTable
from hkd_det.onnx_session import open_session

HEADS = ("form", "runs on", "boxes", "scores", "miss rate", "rise")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Form:
    """One exported file or folder, on one runtime.

    path: its name when it is finished. backend: of `backends.opening.BACKENDS`. exact: FP32, so that parity must hold.
    """

    path: Path
    backend: str
    exact: bool
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """What was seen of a form. parity: None where it does not run here, for the reason `why_not`."""

    form: Form
    parity: Parity | None
    why_not: str = ""


class Verification:
    """Takes forms as they are written; in the end says in a table how far they are from the reference and how they see.

    pictures: that answers are compared on. samples: that miss rates are measured on; they are of `data`.
    """

    def __init__(
        self, reference: Reference, pictures: Sequence[Path], samples: Sequence[Sample] = (), data: str = ""
    ) -> None:
        self._reference, self._data = reference, data
        self._pictures, self._samples = pictures, samples
        self._looked: Seen | None = None
        self._rows: list[Row] = []

    def take(self, form: Form, at: Path | None = None) -> Parity | None:
        """Compare a form; `at` is where it lies until it gets its name. None if it does not run here.

        Raises ParityError if an exact form is out of tolerance, which says where the difference begins, or if any form
        answers NaN; DataError without pictures.
        """
        path, seen = at or form.path, self._seen()
        try:
            with _running(path, form) as (run, batch):
                parity = compare(seen, run, batch, form.exact, form.path.name)
        except HkdError as error:
            if form.exact:
                raise
            self.skip(form, str(error))
            return None
        if math.isnan(parity.box_px) or math.isnan(parity.score):
            raise ParityError(f"{form.path}: answers NaN on {form.backend}, of no use there")
        if form.exact and not parity.holds:
            raise self._refusal(form, parity, path)
        self._rows.append(Row(form, parity))
        return parity

    def skip(self, form: Form, why: str) -> None:
        """Note a form that does not run here."""
        self._rows.append(Row(form, None, why))

    def table(self, known: Mapping[tuple[Path, str], float]) -> str:
        """What was seen, a line a form, and its miss rate, which is measured now, picture by picture.

        known: miss rates, fractions, that have been measured on all samples already, by path and backend.
        """
        reference, unjudged, notes = self._reference, self._unjudged(), [self._note()]
        before = None
        try:
            before = None if unjudged else _miss_rate(reference.detect(self._samples), self._samples)
        except DataError as error:  # a picture larger than a graph takes that letterboxes itself
            unjudged = NOT_MEASURED
            notes.append(str(error))
        lines: list[tuple[str, ...]] = [HEADS]
        lines.append(
            (reference.name, reference.runs_on, "-", "-", unjudged if before is None else _percent(before), "-")
        )
        for row in self._rows:
            start = (str(row.form.path), row.form.backend)
            if row.parity is None:
                lines.append((*start, f"not run here: {row.why_not}"))
                continue
            seen, rise = unjudged, "-"
            if before is not None:
                try:
                    after = self._rate(row.form, known)
                    seen, rise = _percent(after), f"{100 * (after - before):+.2f} points"
                except DataError as error:
                    seen = NOT_MEASURED
                    notes.append(str(error))
            lines.append((*start, f"{row.parity.box_px:.2g} px", f"{row.parity.score:.2g}", seen, rise))
        return "\n".join([*_aligned(lines), *notes])

    def _seen(self) -> Seen:
        if self._looked is None:
            reference = self._reference
            self._looked = look(reference.run, reference.options, self._pictures, reference.runs_on)
        return self._looked

    def _refusal(self, form: Form, parity: Parity, path: Path) -> ParityError:
        where = "what differs inside can't be seen on this runtime"
        if form.backend == "onnxruntime":
            where = self._reference.explain(path, self._seen().batches[parity.worst])
        boxes = f"by up to {parity.box_px:.3g} px" if math.isfinite(parity.box_px) else "beyond all pairing"
        return ParityError(
            f"{form.path}: not written: boxes differ {boxes} and scores by {parity.score:.3g} from "
            f"{self._reference.name} on {self._reference.runs_on}; {where}; please report this with both versions"
        )

    def _unjudged(self) -> str:
        """Why no miss rate can be measured, or nothing."""
        if self._reference.options.raw or not self._reference.options.preprocess:
            return NOT_MEASURED  # a program of the user's own prepares the pictures or chooses the boxes
        return "no people" if _miss_rate([], self._samples) == ABSENT else ""

    def _rate(self, form: Form, known: Mapping[tuple[Path, str], float]) -> float:
        if (form.path, form.backend) in known:
            return known[form.path, form.backend]
        found = detect_all(form.path, form.device, form.backend, self._samples, form.path.name)
        return _miss_rate(found, self._samples)

    def _note(self) -> str:
        smaller = f" (of numbers smaller than FP32: of detections from {SURE:g} up, to the nearest)"
        return (
            f"boxes, scores: largest difference on {len(self._pictures)} pictures"
            f"{'' if all(row.form.exact for row in self._rows) else smaller}; "
            f"miss rate: MR^-2 Reasonable on {len(self._samples)} of {self._data}"
        )


@contextmanager
def _running(path: Path, form: Form) -> Iterator[tuple[Run, int]]:
    """What runs a form, and how many pictures it takes at once."""
    if form.backend == "onnxruntime":  # bare, since it also takes what --raw and --no-preprocess leave to others
        session = open_session(path, form.device)
        (entry,) = session.get_inputs()
        rows = entry.shape[0]
        yield lambda batch: session.run(None, {entry.name: batch}), rows if isinstance(rows, int) else 1
    else:
        with open_backend(path, form.device, backend=form.backend) as opened:
            yield opened.runtime.run, opened.runtime.batch or 1


def _miss_rate(found: Sequence[Detections], samples: Sequence[Sample]) -> float:
    """MR^-2, Reasonable, a fraction; `curve.ABSENT` where nobody is to be found."""
    truth = TruthTable.of([sample.truth for sample in samples])
    return evaluate(truth, DetectionTable.of(found), [REASONABLE])[REASONABLE.name].value


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first two to the left, figures to the right; what has no column ends its line."""
    widths = [max(len(line[place]) for line in lines if len(line) == len(HEADS)) for place in range(len(HEADS))]
    widths[:2] = [max(len(line[place]) for line in lines) for place in range(2)]
    return [
        "  ".join(
            text.ljust(width) if place < 2 or len(line) < len(HEADS) else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]
