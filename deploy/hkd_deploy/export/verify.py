"""Verification of exported models: parity with their reference, miss rates, and the summary table. No torch."""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hkd_deploy.backends import open_backend
from hkd_deploy.backends.base import DEFAULT_CONF
from hkd_deploy.drift import DriftReference, build_reference, count_values
from hkd_deploy.export.parity import (
    MIN_COMPARED_SCORE,
    Parity,
    ParityError,
    Reference,
    ReferenceOutputs,
    RunFunction,
    compare_outputs,
    make_onnx_reference,
    run_reference,
)
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.model import predict_samples, select_evenly
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.console import format_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, first_error_line
from hkd_det.image import read_image
from hkd_det.metrics.bootstrap import MIN_IMAGES, MIN_PERSONS, compare_miss_rates, has_reliable_interval
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult, suggest_operating_point
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections, Sample

TABLE_HEADER = ("model", "backend", "boxes", "scores", "miss rate", "increase")
NOT_MEASURED, NO_DETECTION = "not measured", "no detection"
NUM_PARITY_IMAGES = 16


@dataclass(frozen=True)
class ExportedModel:
    """One exported file or directory on one runtime.

    Attributes:
        path: Final file name.
        backend: Runtime name, a key of `backends.BACKENDS`.
        is_exact: Whether the model is FP32, so that it must agree with the reference within the tolerances.
        device: cpu, cuda or cuda:N.
    """

    path: Path
    backend: str
    is_exact: bool
    device: str = "cpu"


@dataclass(frozen=True)
class VerificationRow:
    """Result of one exported model.

    Attributes:
        model: The model.
        parity: Differences from the reference, or None if the model cannot run on this machine.
        skip_reason: Why it cannot run.
    """

    model: ExportedModel
    parity: Parity | None
    skip_reason: str = ""


class Verification:
    """Comparison of exported models with a reference, formatted as a table.

    Args:
        reference: The model to compare with.
        image_paths: Images for the comparison of outputs.
        samples: Images with ground truth for the miss rates.
        data: Dataset of `samples`, for the table.
    """

    def __init__(
        self, reference: Reference, image_paths: Sequence[Path], samples: Sequence[Sample] = (), data: str = ""
    ) -> None:
        self._reference, self._data = reference, data
        self._image_paths, self._samples = image_paths, samples
        self._reference_outputs: ReferenceOutputs | None = None
        self._reference_detections: list[Detections] | None = None
        self._rows: list[VerificationRow] = []

    def add(self, model: ExportedModel, temp_path: Path | None = None) -> Parity | None:
        """Compare a model with the reference and add a row to the table.

        Args:
            model: The exported model.
            temp_path: Current location of a model that does not have its final name yet.

        Returns:
            The differences, or None if a reduced-precision model cannot run on this machine.

        Raises:
            ParityError: If an FP32 model exceeds the tolerances, or any model returns NaN.
            DataError: If there is no image to compare on.
        """
        path, reference_outputs = temp_path or model.path, self._get_reference_outputs()
        try:
            with _open_runner(path, model) as (run, batch_size):
                parity = compare_outputs(reference_outputs, run, batch_size, model.is_exact, model.path.name)
        except HkdError as error:
            if model.is_exact:
                raise
            self.skip(model, str(error))
            return None
        if math.isnan(parity.box_error_px) or math.isnan(parity.score_error):
            raise ParityError(f"{model.path}: outputs are NaN on {model.backend}. Select another precision or runtime.")
        if model.is_exact and not parity.within_tolerance:
            raise self._make_parity_error(model, parity, path)
        self._rows.append(VerificationRow(model, parity))
        return parity

    def skip(self, model: ExportedModel, reason: str) -> None:
        """Add a row for a model that cannot run on this machine.

        Args:
            model: The exported model.
            reason: Why it cannot run, for the table.
        """
        self._rows.append(VerificationRow(model, None, reason))

    def suggest_conf(self) -> float | None:
        """Return the score threshold with the highest F1 score of the reference in the setup Reasonable.

        Returns:
            The threshold, rounded down to three decimals. None if it cannot be measured, if the samples have fewer than
            `MIN_PERSONS` persons, or if the reference detects none of them.
        """
        if self._get_miss_rate_skip_reason():
            return None
        try:
            results = evaluate_detections(self._samples, self._predict_reference(), [REASONABLE])
        except DataError:  # `format_table` reports it
            return None
        result = results[REASONABLE.name]
        point = suggest_operating_point(result)
        if result.num_gt < MIN_PERSONS or not point.recall:
            return None
        return math.floor(1000 * point.threshold) / 1000

    def measure_reference(self, conf: float | None) -> DriftReference | None:
        """Return the distributions of the detections of the reference model, for `hkd-demo --monitor`.

        Args:
            conf: Minimum score of a person. None for `DEFAULT_CONF`.

        Returns:
            The distributions. None if they cannot be measured, or if there are too few images or persons.
        """
        if self._get_miss_rate_skip_reason():
            return None
        min_score = DEFAULT_CONF if conf is None else conf
        try:
            detections = self._predict_reference()
            images = [
                count_values(found, (sample.size_hw or read_image(sample.path).shape[:2])[0], min_score)
                for found, sample in zip(detections, self._samples, strict=True)
            ]
        except DataError:  # `format_table` reports it
            return None
        return build_reference(images, min_score)

    def format_table(self, known_miss_rates: Mapping[tuple[Path, str], MissRateResult]) -> str:
        """Measure the miss rates and return the table, one line per model.

        Args:
            known_miss_rates: Miss rates on all samples that are already measured, by path and backend.
        """
        reference, no_rate, notes = self._reference, self._get_miss_rate_skip_reason(), [self._format_note()]
        reference_rate = None
        try:
            if not no_rate:
                reference_rate = _compute_miss_rate(self._predict_reference(), self._samples)
        except DataError as error:  # an image is larger than a graph with an in-graph letterbox accepts
            no_rate = NOT_MEASURED
            notes.append(str(error))
        rate_cell = no_rate if reference_rate is None else _format_percent(reference_rate.value)
        rows = [(reference.name, reference.backend, "-", "-", rate_cell, "-")]
        for row in self._rows:
            name_cells = (str(row.model.path), row.model.backend)
            if row.parity is None:
                rows.append((*name_cells, "not run", "-", "-", "-"))
                notes.append(f"{row.model.path} on {row.model.backend}: not run: {row.skip_reason}")
                continue
            rate_cells = (no_rate, "-")
            if reference_rate is not None:
                try:
                    rate = self._measure_miss_rate(row.model, known_miss_rates)
                    rate_cells = _format_percent(rate.value), _format_increase(rate, reference_rate)
                    if rate.value == 1 > reference_rate.value:
                        notes.append(f"{row.model.path} on {row.model.backend} detects no person")
                except DataError as error:
                    rate_cells = (NOT_MEASURED, "-")
                    notes.append(str(error))
            parity_cells = f"{row.parity.box_error_px:.2g} px", f"{row.parity.score_error:.2g}"
            if not row.parity.num_compared:
                parity_cells = NO_DETECTION, "-"
                notes.append(_format_nothing_compared(row.model, reference.name))
            rows.append((*name_cells, *parity_cells, *rate_cells))
        if reference_rate is not None and reference_rate.value == 1:
            notes.append(f"{reference.name} detects no person of the setup Reasonable: increases are not stated")
        elif reference_rate is not None and not has_reliable_interval(reference_rate):
            notes.append(
                f"increase: no interval from {reference_rate.num_images} images with {reference_rate.num_gt} persons, "
                f"at least {MIN_IMAGES} and {MIN_PERSONS} are needed"
            )
        return "\n".join([format_table(rows, TABLE_HEADER, left_columns=2), *notes])

    def _get_reference_outputs(self) -> ReferenceOutputs:
        if self._reference_outputs is None:
            reference = self._reference
            self._reference_outputs = run_reference(
                reference.run, reference.options, self._image_paths, reference.backend
            )
        return self._reference_outputs

    def _predict_reference(self) -> list[Detections]:
        if self._reference_detections is None:
            self._reference_detections = self._reference.predict(self._samples)
        return self._reference_detections

    def _make_parity_error(self, model: ExportedModel, parity: Parity, path: Path) -> ParityError:
        location = f"the layer that differs cannot be located on {model.backend}"
        if model.backend == "onnxruntime":
            batch = self._get_reference_outputs().batches[parity.worst_index]
            location = self._reference.locate_difference(path, batch)
        boxes = f"up to {parity.box_error_px:.3g} px" if math.isfinite(parity.box_error_px) else "unmatched boxes"
        return ParityError(
            f"{model.path}: not written: differs from {self._reference.name} on {self._reference.backend} "
            f"(boxes: {boxes}, scores: {parity.score_error:.3g}); {location}. "
            "Export with --no-verify to write it nevertheless."
        )

    def _get_miss_rate_skip_reason(self) -> str:
        """Return why no miss rate can be measured, or an empty string."""
        if self._reference.options.raw or not self._reference.options.preprocess:
            return NOT_MEASURED  # a custom program prepares the images or decodes the outputs
        return "no persons" if not _compute_miss_rate([], self._samples).num_gt else ""

    def _measure_miss_rate(
        self, model: ExportedModel, known_miss_rates: Mapping[tuple[Path, str], MissRateResult]
    ) -> MissRateResult:
        if (model.path, model.backend) in known_miss_rates:
            return known_miss_rates[model.path, model.backend]
        detections = predict_samples(model.path, model.device, model.backend, self._samples, model.path.name)
        return _compute_miss_rate(detections, self._samples)

    def _format_note(self) -> str:
        reduced = f" (reduced precision: nearest detection, scores of at least {MIN_COMPARED_SCORE:g})"
        return (
            f"boxes, scores: largest difference on {len(self._image_paths)} images"
            f"{'' if all(row.model.is_exact for row in self._rows) else reduced}; "
            f"miss rate: MR^-2 Reasonable on {len(self._samples)} images of {self._data}; increase: 95 % interval"
        )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verification flags to `parser`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("verification", "on the val split of --data")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare each written file with its source and measure its miss rate (default: yes)",
    )
    group.add_argument(
        "--verify-images", type=int, metavar="N", help="number of images for the miss rate (default: all)"
    )


def build_verification(reference: Reference, data: str, flags: argparse.Namespace) -> Verification:
    """Select the images for parity and miss rates from the val split of a dataset.

    Args:
        reference: The model to compare with.
        data: The dataset.
        flags: Parsed flags of `add_verify_arguments`.

    Returns:
        The verification.

    Raises:
        HkdError: If the dataset cannot be read.
    """
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"verification images: {first_error_line(error)}. Set --data or --no-verify.") from error
    image_paths = [sample.path for sample in select_evenly(samples, NUM_PARITY_IMAGES)]
    return Verification(reference, image_paths, select_evenly(samples, flags.verify_images or len(samples)), data)


def build_onnx_verification(onnx_path: Path, flags: argparse.Namespace) -> Verification | None:
    """Verify against an ONNX file; None with --no-verify.

    A device rarely has the training dataset. If neither --verify nor --data is set, a missing dataset is not an error.

    Args:
        onnx_path: ONNX file of hkd-export.
        flags: Parsed command line.

    Returns:
        The verification, or None.
    """
    if flags.verify is False:
        return None
    onnx_file = read_onnx_file(onnx_path)
    try:
        data = flags.data or ModelMetadata.from_metadata(onnx_file.metadata, onnx_path).data
        return build_verification(make_onnx_reference(onnx_path), data, flags)
    except HkdError as error:
        if flags.verify or flags.data:
            raise
        print(f"hkd-export: not verified: {error}", file=sys.stderr)
        return None


@contextmanager
def _open_runner(path: Path, model: ExportedModel) -> Iterator[tuple[RunFunction, int]]:
    """Open a model; yield the function that runs a batch, and the batch size."""
    if model.backend == "onnxruntime":
        # A plain session also runs graphs of --raw and --no-preprocess, which the backend does not accept.
        session = open_session(path, model.device)
        (graph_input,) = session.get_inputs()
        batch_size = graph_input.shape[0] if isinstance(graph_input.shape[0], int) else 1
        yield lambda batch: session.run(None, {graph_input.name: batch}), batch_size
    else:
        with open_backend(path, model.device, backend=model.backend) as opened:
            yield opened.runtime.run, opened.runtime.batch or 1


def _compute_miss_rate(detections: Sequence[Detections], samples: Sequence[Sample]) -> MissRateResult:
    """Return MR^-2 of the setup Reasonable."""
    return evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name]


def _format_increase(rate: MissRateResult, reference: MissRateResult) -> str:
    """Return the increase in points, with its 95 % interval if the images suffice for one."""
    if reference.value == 1:
        return "-"
    increase = f"{100 * (rate.value - reference.value):+.2f} points"
    difference = compare_miss_rates(rate, reference) if has_reliable_interval(reference) else None
    if difference is None:
        return increase
    return f"{increase} ({100 * difference.ci_low:+.2f} to {100 * difference.ci_high:+.2f})"


def _format_nothing_compared(model: ExportedModel, reference_name: str) -> str:
    scores = "" if model.is_exact else f" with a score of at least {MIN_COMPARED_SCORE:g}"
    return (
        f"{model.path} on {model.backend}: neither it nor {reference_name} has a detection{scores} on the images: "
        "nothing is compared. Set --data to images with persons that the model detects"
    )


def _format_percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"
