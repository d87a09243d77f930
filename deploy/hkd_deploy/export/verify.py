"""Verification: every exported form of a detector against what it was made of, on real pictures. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hkd_deploy.backends import open_backend
from hkd_deploy.export.parity import (
    MIN_COMPARED_SCORE,
    Parity,
    ParityError,
    Reference,
    ReferenceOutputs,
    RunFunction,
    compare_outputs,
    run_reference,
)
from hkd_deploy.precision.report import predict_samples
from hkd_det.errors import DataError, HkdError
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import NO_GROUND_TRUTH
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections, Sample

TABLE_HEADER = ("form", "runs on", "boxes", "scores", "miss rate", "rise")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class ExportedModel:
    """One exported file or folder, on one runtime.

    path: its name when it is finished. backend: of `backends.opening.BACKENDS`. exact: FP32, so that parity must hold.
    """

    path: Path
    backend: str
    is_exact: bool
    device: str = "cpu"


@dataclass(frozen=True)
class VerificationRow:
    """What was seen of a form. parity: None where it does not run here, for the reason `why_not`."""

    model: ExportedModel
    parity: Parity | None
    skip_reason: str = ""


class Verification:
    """Takes forms as they are written; in the end says in a table how far they are from the reference and how they see.

    pictures: that answers are compared on. samples: that miss rates are measured on; they are of `data`.
    """

    def __init__(
        self, reference: Reference, image_paths: Sequence[Path], samples: Sequence[Sample] = (), data: str = ""
    ) -> None:
        self._reference, self._data = reference, data
        self._image_paths, self._samples = image_paths, samples
        self._reference_outputs: ReferenceOutputs | None = None
        self._rows: list[VerificationRow] = []

    def add(self, model: ExportedModel, temp_path: Path | None = None) -> Parity | None:
        """Compare a form; `at` is where it lies until it gets its name. None if it does not run here.

        Raises ParityError if an exact form is out of tolerance, which says where the difference begins, or if any form
        answers NaN; DataError without pictures.
        """
        path, seen = temp_path or model.path, self._get_reference_outputs()
        try:
            with _open_runner(path, model) as (run, batch):
                parity = compare_outputs(seen, run, batch, model.is_exact, model.path.name)
        except HkdError as error:
            if model.is_exact:
                raise
            self.skip(model, str(error))
            return None
        if math.isnan(parity.box_error_px) or math.isnan(parity.score_error):
            raise ParityError(f"{model.path}: answers NaN on {model.backend}, of no use there")
        if model.is_exact and not parity.within_tolerance:
            raise self._parity_error(model, parity, path)
        self._rows.append(VerificationRow(model, parity))
        return parity

    def skip(self, model: ExportedModel, reason: str) -> None:
        """Note a form that does not run here."""
        self._rows.append(VerificationRow(model, None, reason))

    def format_table(self, known_miss_rates: Mapping[tuple[Path, str], float]) -> str:
        """What was seen, a line a form, and its miss rate, which is measured now, picture by picture.

        known: miss rates, fractions, that have been measured on all samples already, by path and backend.
        """
        reference, unjudged, notes = self._reference, self._get_miss_rate_skip_reason(), [self._format_note()]
        before = None
        try:
            before = None if unjudged else _compute_miss_rate(reference.predict(self._samples), self._samples)
        except DataError as error:  # a picture larger than a graph takes that letterboxes itself
            unjudged = NOT_MEASURED
            notes.append(str(error))
        lines: list[tuple[str, ...]] = [TABLE_HEADER]
        lines.append(
            (reference.name, reference.backend, "-", "-", unjudged if before is None else _format_percent(before), "-")
        )
        for row in self._rows:
            start = (str(row.model.path), row.model.backend)
            if row.parity is None:
                lines.append((*start, f"not run here: {row.skip_reason}"))
                continue
            seen, rise = unjudged, "-"
            if before is not None:
                try:
                    after = self._measure_miss_rate(row.model, known_miss_rates)
                    seen, rise = _format_percent(after), f"{100 * (after - before):+.2f} points"
                except DataError as error:
                    seen = NOT_MEASURED
                    notes.append(str(error))
            lines.append((*start, f"{row.parity.box_error_px:.2g} px", f"{row.parity.score_error:.2g}", seen, rise))
        return "\n".join([*_align_columns(lines), *notes])

    def _get_reference_outputs(self) -> ReferenceOutputs:
        if self._reference_outputs is None:
            reference = self._reference
            self._reference_outputs = run_reference(
                reference.run, reference.options, self._image_paths, reference.backend
            )
        return self._reference_outputs

    def _parity_error(self, model: ExportedModel, parity: Parity, path: Path) -> ParityError:
        where = "what differs inside can't be seen on this runtime"
        if model.backend == "onnxruntime":
            where = self._reference.locate_difference(path, self._get_reference_outputs().batches[parity.worst_index])
        boxes = f"by up to {parity.box_error_px:.3g} px" if math.isfinite(parity.box_error_px) else "beyond all pairing"
        return ParityError(
            f"{model.path}: not written: boxes differ {boxes} and scores by {parity.score_error:.3g} from "
            f"{self._reference.name} on {self._reference.backend}; {where}; please report this with both versions"
        )

    def _get_miss_rate_skip_reason(self) -> str:
        """Why no miss rate can be measured, or nothing."""
        if self._reference.options.raw or not self._reference.options.preprocess:
            return NOT_MEASURED  # a program of the user's own prepares the pictures or chooses the boxes
        return "no people" if _compute_miss_rate([], self._samples) == NO_GROUND_TRUTH else ""

    def _measure_miss_rate(self, model: ExportedModel, known_miss_rates: Mapping[tuple[Path, str], float]) -> float:
        if (model.path, model.backend) in known_miss_rates:
            return known_miss_rates[model.path, model.backend]
        found = predict_samples(model.path, model.device, model.backend, self._samples, model.path.name)
        return _compute_miss_rate(found, self._samples)

    def _format_note(self) -> str:
        smaller = f" (of numbers smaller than FP32: of detections from {MIN_COMPARED_SCORE:g} up, to the nearest)"
        return (
            f"boxes, scores: largest difference on {len(self._image_paths)} pictures"
            f"{'' if all(row.model.is_exact for row in self._rows) else smaller}; "
            f"miss rate: MR^-2 Reasonable on {len(self._samples)} of {self._data}"
        )


@contextmanager
def _open_runner(path: Path, model: ExportedModel) -> Iterator[tuple[RunFunction, int]]:
    """What runs a form, and how many pictures it takes at once."""
    if model.backend == "onnxruntime":  # bare, since it also takes what --raw and --no-preprocess leave to others
        session = open_session(path, model.device)
        (entry,) = session.get_inputs()
        rows = entry.shape[0]
        yield lambda batch: session.run(None, {entry.name: batch}), rows if isinstance(rows, int) else 1
    else:
        with open_backend(path, model.device, backend=model.backend) as opened:
            yield opened.runtime.run, opened.runtime.batch or 1


def _compute_miss_rate(detections: Sequence[Detections], samples: Sequence[Sample]) -> float:
    """MR^-2, Reasonable, a fraction; `curve.ABSENT` where nobody is to be found."""
    return evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name].value


def _format_percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def _align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first two to the left, figures to the right; what has no column ends its line."""
    widths = [
        max(len(line[place]) for line in lines if len(line) == len(TABLE_HEADER)) for place in range(len(TABLE_HEADER))
    ]
    widths[:2] = [max(len(line[place]) for line in lines) for place in range(2)]
    return [
        "  ".join(
            text.ljust(width) if place < 2 or len(line) < len(TABLE_HEADER) else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]
