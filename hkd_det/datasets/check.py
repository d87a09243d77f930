"""Validation of a dataset (`hkd-train --check`): read every annotation, decode every image, count, plot, report."""

import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_det.datasets.audit import PROPOSAL_SCORE, SplitAudit, audit_split
from hkd_det.datasets.audit_coco import AuditedAs, plan_audited_files, write_audited_split, write_audited_yaml
from hkd_det.datasets.audit_models import AuditModel, detect_with_cache, open_audit_models
from hkd_det.datasets.audit_report import make_audit_rows, write_audit_json, write_audit_page
from hkd_det.datasets.base import ErrorHandler
from hkd_det.datasets.catalog import SPLITS, list_splits, load_dataset
from hkd_det.datasets.check_report import SplitReport, make_contact_sheet, plot_histograms, write_dataset_report
from hkd_det.datasets.check_summary import SplitSummary, escape_nonprintable, format_summary, summarize
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, write_text
from hkd_det.image import read_image
from hkd_det.structures import Sample
from hkd_det.text_table import format_table

ReadableSample = tuple[Sample, tuple[int, int]]  # with height and width of the image in pixels

NUM_THREADS = 4  # OpenCV releases the GIL while it decodes
MAX_PRINTED = 50  # errors on the terminal


@dataclass(frozen=True)
class AuditOptions:
    """Options of the label audit.

    Attributes:
        models: ONNX detectors.
        config_paths: Model configuration of each detector; None for its metadata or the YAML file next to it.
        device: "cpu", "cuda" or "cuda:N".
        min_score: Minimum score of a probable missing label, 0 to 1.
        write_audited: Output file of --write-audited; empty to write none.
        audited_as: How missing people are added to that file.
    """

    models: tuple[Path, ...]
    config_paths: tuple[Path | None, ...] = ()
    device: str = "cpu"
    min_score: float = PROPOSAL_SCORE
    write_audited: str = ""
    audited_as: AuditedAs = "ignore"


def check_dataset(data: str, output_dir: Path, audit: AuditOptions | None = None) -> int:
    """Check every split of a dataset, print a summary and write a report.

    The report consists of `index.html`, `errors.txt`, and a contact sheet and histograms of each split as PNG. The
    audit adds `audit.html`, `audit.json` and the detections of each model.

    Args:
        data: Name in datasets.yaml or path of a .yaml file.
        output_dir: Directory of the report.
        audit: Options of the label audit (default: no audit).

    Returns:
        0, or 1 if there are errors. Findings of the audit are not errors.

    Raises:
        UsageError: The dataset is unknown, its entry has an invalid key, or an option of the audit is invalid.
        DataError: A model of the audit is missing or invalid, or there is no image to audit.
    """
    errors: dict[str, None] = {}  # an ordered set
    splits = list_splits(data)
    if not splits:
        raise UsageError(f"--data {data}: nothing to check. Expected at least one of {', '.join(SPLITS)}.")
    models = open_audit_models(audit.models, audit.config_paths, audit.device) if audit else []
    audited_paths = plan_audited_files(data, audit.write_audited, splits) if audit and audit.write_audited else {}
    reports, readable = [], {}
    for split in splits:
        report, readable[split] = _check_split(data, split, output_dir, errors)
        reports.append(report)
    lines = list(errors)
    write_text(output_dir / "errors.txt", "".join(f"{line}\n" for line in lines))
    write_dataset_report(output_dir / "index.html", escape_nonprintable(data), reports, lines)
    _print_errors(lines, output_dir)
    if audit:
        audits = _run_audit(data, readable, models, audit, output_dir)
        if audited_paths:
            _write_audited(data, readable, audits, audited_paths, audit, output_dir)
    return 1 if lines else 0


def validate_images(samples: Sequence[Sample], on_error: ErrorHandler) -> list[tuple[int, int] | None]:
    """Decode every image and compare its size with the annotation.

    Args:
        samples: Samples to check.
        on_error: Function that receives each error.

    Returns:
        Height and width of each image in pixels; None if it cannot be decoded.
    """
    sizes: list[tuple[int, int] | None] = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        results = pool.map(_read_size_or_error, samples)
        progress = tqdm(results, desc="decode", total=len(samples), unit="image", leave=False, delay=2)
        for sample, size in zip(samples, progress, strict=True):
            if isinstance(size, DataError):
                on_error(size)
                sizes.append(None)
                continue
            if sample.size_hw is not None and sample.size_hw != size:
                annotated = f"{sample.size_hw[1]} x {sample.size_hw[0]}"
                on_error(
                    DataError(f"{sample.path}: the image has {size[1]} x {size[0]} pixels, its annotation {annotated}")
                )
            sizes.append(size)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the queue
    return sizes


def _read_size_or_error(sample: Sample) -> tuple[int, int] | DataError:
    try:
        height, width = read_image(sample.path).shape[:2]
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{sample.path}: {error.strerror or error}")
    return height, width


def _check_split(
    data: str, split: str, output_dir: Path, errors: dict[str, None]
) -> tuple[SplitReport, list[ReadableSample]]:
    def add_error(error: DataError) -> None:
        errors[escape_nonprintable(f"{split}: {error}")] = None

    samples: list[Sample] = []
    try:
        samples = load_dataset(data, split, add_error)
    except DataError as error:  # a whole file is invalid, or no sample is left
        add_error(error)
    except OSError as error:  # a directory without permission, or a name that is too long
        add_error(DataError(f"{error.filename}: {error.strerror}"))
    sizes = validate_images(samples, add_error)
    summary = summarize(split, samples, sizes)
    print(format_summary(summary))
    readable = [(sample, size) for sample, size in zip(samples, sizes, strict=True) if size]
    return SplitReport(summary, _save_images(summary, readable, output_dir)), readable


def _save_images(summary: SplitSummary, readable_samples: Sequence[ReadableSample], output_dir: Path) -> bytes:
    """Write histograms and contact sheet as PNG; return the contact sheet as JPEG, empty without readable images."""
    histograms_path = output_dir / f"{summary.split}_histograms.png"
    sheet_path = output_dir / f"{summary.split}_images.png"
    for path in (histograms_path, sheet_path):
        path.unlink(missing_ok=True)
    if summary.num_gt:
        with atomic_write(histograms_path) as temp_path:
            plot_histograms(summary).savefig(temp_path, dpi=110)
    if not readable_samples:
        return b""
    sheet = make_contact_sheet(readable_samples)
    with atomic_write(sheet_path) as temp_path:
        temp_path.write_bytes(_encode_sheet(sheet, ".png"))
    return _encode_sheet(sheet, ".jpg")


def _encode_sheet(image_rgb: NDArray[np.uint8], suffix: str) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def _print_errors(errors: Sequence[str], output_dir: Path) -> None:
    print(f"\n{len(errors):,} error{'' if len(errors) == 1 else 's'}" if errors else "\nno errors")
    for error in errors[:MAX_PRINTED]:
        print(f"  {error}")
    if len(errors) > MAX_PRINTED:
        print(f"  ... and {len(errors) - MAX_PRINTED:,} more: {output_dir / 'errors.txt'}")
    print(f"saved {output_dir / 'index.html'}")


def _run_audit(
    data: str,
    readable: Mapping[str, Sequence[ReadableSample]],
    models: Sequence[AuditModel],
    options: AuditOptions,
    output_dir: Path,
) -> list[SplitAudit]:
    """Audit the labels of all splits with readable images, print the figures, and write page and JSON file."""
    samples = {split: [sample for sample, _ in pairs] for split, pairs in readable.items() if pairs}
    if not samples:
        raise DataError(f"--data {data}: --audit: contains no readable images. Add images, or repair the errors above.")
    audits = []
    for split, split_samples in samples.items():
        caches = [output_dir / f"detections_{split}_{number}.npz" for number in range(1, len(models) + 1)]
        detections = detect_with_cache(models, split_samples, caches)
        audits.append(audit_split(split, split_samples, detections, options.min_score))
        rows = format_table(make_audit_rows(audits[-1], len(models)), left_columns=2)
        print(f"\n{split}: label audit with {', '.join(model.name for model in models)}\n{textwrap.indent(rows, '  ')}")
    write_audit_json(output_dir / "audit.json", data, models, audits, options.min_score)
    page = output_dir / "audit.html"
    write_audit_page(page, escape_nonprintable(data), models, audits, list(samples.values()))
    print(f"\nsaved {page} and audit.json")
    return audits


def _write_audited(
    data: str,
    readable: Mapping[str, Sequence[ReadableSample]],
    audits: Sequence[SplitAudit],
    paths: Mapping[str, Path],
    options: AuditOptions,
    output_dir: Path,
) -> None:
    written = {}
    for audit in audits:
        path, pairs = paths[audit.split], readable[audit.split]
        split = write_audited_split(path, data, audit.split, pairs, audit.select("missing"), options.audited_as)
        print(f"saved {path}: {split.num_labels:,} labels and {split.num_ignore_regions:,} ignore regions added")
        written[audit.split] = split
    yaml_path = output_dir / "audited.yaml"
    write_audited_yaml(yaml_path, data, written)
    print(f"saved {yaml_path}. Use it as --data to train with these annotations.")
