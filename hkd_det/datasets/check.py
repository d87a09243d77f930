"""Validation of a dataset (`hkd-train --check`): read every annotation, decode every image, count, plot, report."""

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.console import Progress, format_table, log_stage
from hkd_det.datasets.audit import SplitAudit
from hkd_det.datasets.audit_report import plan_audited_files
from hkd_det.datasets.audit_run import AuditOptions, ReadableSample, open_audit_models, run_audit, write_audited
from hkd_det.datasets.base import DatasetError, ErrorHandler, raise_error, set_image
from hkd_det.datasets.catalog import find_common_images, list_splits, load_dataset
from hkd_det.datasets.check_browser import (
    PAGE_NAME,
    BrowsedImage,
    add_duplicates,
    add_findings,
    list_browsed_images,
    open_preview_dir,
    select_images,
    write_browser_page,
)
from hkd_det.datasets.check_report import (
    SOURCE_NAME,
    DuplicateReport,
    SplitReport,
    describe_source,
    encode_sheet,
    save_split_images,
    write_dataset_report,
)
from hkd_det.datasets.check_summary import ProblemLog, escape_nonprintable, format_summary, summarize
from hkd_det.datasets.data_yaml import SPLITS
from hkd_det.datasets.duplicates import (
    THUMBNAIL_PX,
    DuplicateSearch,
    ImageSet,
    Thumbnails,
    draw_duplicates,
    make_thumbnail,
    search_duplicates,
    write_duplicates_json,
)
from hkd_det.datasets.image_files import make_stated_size_error
from hkd_det.datasets.image_page import (
    DEFAULT_MAX_IMAGES,
    NUM_THREADS,
    PREVIEW_DIR,
    make_preview_paths,
    write_preview,
    write_previews,
)
from hkd_det.errors import DataError, UsageError
from hkd_det.files import write_text
from hkd_det.image import decode_image, read_image_bytes
from hkd_det.image_header import UPRIGHT, parse_image_header
from hkd_det.structures import Sample

MAX_PRINTED = 50  # errors on the terminal


@dataclass(frozen=True, eq=False)
class InspectedImage:
    """Properties of a decoded image.

    Attributes:
        size_hw: Height and width in pixels.
        thumbnail (array[32, 32], uint8): Gray thumbnail.
        is_exif_rotated: True if the EXIF orientation rotates or flips the stored pixels.
    """

    size_hw: tuple[int, int]
    thumbnail: Thumbnails
    is_exif_rotated: bool


@dataclass(frozen=True, eq=False)
class _CheckedSplit:
    samples: list[Sample]
    sizes_hw: list[tuple[int, int] | None]
    report: SplitReport
    image_set: ImageSet

    @property
    def readable(self) -> list[ReadableSample]:
        return [(sample, size) for sample, size in zip(self.samples, self.sizes_hw, strict=True) if size]


def check_dataset(
    data: str,
    output_dir: Path,
    audit: AuditOptions | None = None,
    against: Sequence[str] = (),
    json_output: str = "",
    max_images: int = DEFAULT_MAX_IMAGES,
) -> int:
    """Check every split of a dataset, print a summary and write a report.

    The report consists of `index.html`, `errors.txt`, `duplicates.json`, and a contact sheet and histograms of each
    split as PNG. `images.html` shows all images, and `thumbnails/` contains their thumbnails. The audit adds
    `audit.html`, `audit.json` and the detections of each model. A check that fails leaves no empty directory.

    Args:
        data: Name in datasets.yaml, path of a .yaml file, or another source that `load_dataset` reads.
        output_dir: Directory of the report.
        audit: Options of the label audit (default: no audit).
        against: Other datasets in which near-duplicates of the images are searched.
        json_output: File for the counts and problems of each split as JSON, or "-" for stdout. The summary then goes
            to stderr.
        max_images: Maximum number of images in `images.html`; 0 writes no such page.

    Returns:
        0, or 1 if there are errors. Warnings, near-duplicates and findings of the audit are not errors.

    Raises:
        UsageError: The dataset is unknown, its entry has an invalid key, or an option of the audit is invalid.
        DataError: A model of the audit is missing or invalid, or there is no image to audit.
    """
    with redirect_stdout(sys.stderr if json_output == "-" else sys.stdout):
        num_errors, result = _check_all_splits(data, output_dir, audit, against, max_images)
    text = json.dumps(result, indent=1) + "\n"
    if json_output == "-":
        sys.stdout.write(text)
    elif json_output:
        write_text(Path(json_output), text)
    return 1 if num_errors else 0


def _check_all_splits(
    data: str, output_dir: Path, audit: AuditOptions | None, against: Sequence[str], max_images: int
) -> tuple[int, dict[str, Any]]:
    """Return the number of errors and the content of --json."""
    splits = list_splits(data)
    if not splits:
        raise UsageError(f"--data {data}: nothing to check. Expected at least one of {', '.join(SPLITS)}.")
    models = open_audit_models(audit.models, audit.config_paths, audit.device) if audit else []
    audited_paths = plan_audited_files(data, audit.write_audited, splits) if audit and audit.write_audited else {}
    for other in against:
        list_splits(other)  # an unknown dataset is an error before the check starts
    logs = {split: ProblemLog(split) for split in splits}
    samples = {split: _load_samples(data, logs[split]) for split in splits}
    num_images = sum(map(len, samples.values()))
    with open_preview_dir(output_dir, splits, max_images) as preview_dir:
        has_all = preview_dir is not None and num_images <= max_images
        checked = {
            split: _check_split(logs[split], samples[split], output_dir, preview_dir if has_all else None)
            for split in splits
        }
        searches = _check_duplicates([one.image_set for one in checked.values()], against, output_dir)
        _check_splits(data, checked, logs, searches)
        lines = [line for log in logs.values() for line in log.list_lines(is_error=True)]
        warnings = [line for log in logs.values() for line in log.list_lines(is_error=False)]
        write_text(output_dir / SOURCE_NAME, f"{describe_source(data)}\n")
        write_text(output_dir / "errors.txt", "".join(f"{line}\n" for line in lines))
        reports = [one.report for one in checked.values()]
        duplicates = [_make_duplicate_report(search) for search in searches]
        name, link = escape_nonprintable(data), PAGE_NAME if max_images else ""
        write_dataset_report(output_dir / "index.html", name, reports, duplicates, lines, warnings, link)
        _print_problems(lines, warnings, output_dir)
        audits: list[SplitAudit] = []
        if audit:
            readable = {split: one.readable for split, one in checked.items()}
            audits = run_audit(data, readable, models, audit, output_dir)
            if audited_paths:
                write_audited(data, readable, audits, audited_paths, audit, output_dir)
        images = _list_browsed_images(checked, logs, searches, audits)
        shown = select_images(images, max_images)
        if preview_dir:
            files = [(one.path, preview_dir / one.preview) for one in shown if one.size_hw]
            write_previews([pair for pair in files if not pair[1].exists()])
    if max_images:
        page = output_dir / PAGE_NAME
        write_browser_page(page, name, shown, len(images), output_dir / PREVIEW_DIR)
        print(f"saved {page} with {len(shown):,} images")
    return len(lines), {"splits": {split: _make_record(one, logs[split]) for split, one in checked.items()}}


def _make_record(checked: _CheckedSplit, log: ProblemLog) -> dict[str, Any]:
    """Return the record of a split in the JSON. Images that cannot be read are problems and are not counted."""
    summary, ignore = checked.report.summary, [sample.ground_truth.ignore for sample, _ in checked.readable]
    return {
        "images": len(ignore),
        "persons": sum(int((~flags).sum()) for flags in ignore),
        "ignored": sum(int(flags.sum()) for flags in ignore),
        "unused_classes": dict(summary.unused_classes),
        "problems": log.list_records(),
    }


def _load_samples(data: str, log: ProblemLog) -> list[Sample]:
    log_stage(f"{log.split}: read the annotations")
    try:
        return load_dataset(data, log.split, log.add)
    except DataError as error:  # a whole file is invalid, or no sample is left
        log.add(error)
    except OSError as error:  # a directory without permission, or a name that is too long
        log.add(DataError(f"{error.filename}: {error.strerror}. Check the path and the permissions."))
    return []


def _check_split(log: ProblemLog, samples: list[Sample], output_dir: Path, preview_dir: Path | None) -> _CheckedSplit:
    previews = make_preview_paths(log.split, len(samples))
    log_stage(f"{log.split}: decode {len(samples):,} images")
    images = inspect_images(
        samples,
        lambda error: log.add(error, "image"),
        [preview_dir / path for path in previews] if preview_dir else None,
    )
    sizes = [image.size_hw if image else None for image in images]
    num_rotated = sum(image.is_exif_rotated for image in images if image)
    summary = summarize(log.split, samples, sizes, num_rotated, log.unused_classes)
    print(format_summary(summary))
    readable = [(sample, size) for sample, size in zip(samples, sizes, strict=True) if size]
    report = SplitReport(summary, save_split_images(summary, readable, output_dir))
    return _CheckedSplit(samples, sizes, report, make_image_set(log.split, samples, images))


def inspect_images(
    samples: Sequence[Sample], on_error: ErrorHandler, previews: Sequence[Path] | None = None
) -> list[InspectedImage | None]:
    """Decode every image and compare its size with the annotation.

    Args:
        samples: Samples to check.
        on_error: Function that receives each error.
        previews: Output file of the thumbnail of each image; None writes no thumbnails.

    Returns:
        Properties of each image; None if it cannot be decoded.
    """
    images: list[InspectedImage | None] = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        results = pool.map(_inspect_or_error, samples, previews or [None] * len(samples))
        with Progress(len(samples), "decode", "image", delay_s=2) as progress:
            for sample, result in zip(samples, results, strict=True):
                progress.update()
                if isinstance(result, DataError):
                    on_error(set_image(result, sample.path))
                    images.append(None)
                    continue
                if sample.size_hw is not None and sample.size_hw != result.size_hw:
                    error = make_stated_size_error(sample.path, sample.size_hw, result.size_hw)
                    on_error(set_image(error, sample.path))
                images.append(result)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the queue
    return images


def _inspect_or_error(sample: Sample, preview: Path | None) -> InspectedImage | DataError:
    try:
        encoded = read_image_bytes(sample.path)
        image = decode_image(encoded, sample.path)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{sample.path}: {error.strerror or error}. Check the permissions.")
    if preview:
        write_preview(image, preview)
    header = parse_image_header(encoded)
    is_rotated = header is not None and header.orientation != UPRIGHT
    return InspectedImage((image.shape[0], image.shape[1]), make_thumbnail(image), is_rotated)


def make_image_set(name: str, samples: Sequence[Sample], images: Sequence[InspectedImage | None]) -> ImageSet:
    """Return the readable images for the search of near-duplicates.

    Args:
        name: Name of the split.
        samples: Samples of the split.
        images: Properties of each image; None if it cannot be decoded.
    """
    pairs = [(sample.path, image.thumbnail) for sample, image in zip(samples, images, strict=True) if image]
    thumbnails = np.array([thumbnail for _, thumbnail in pairs], np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)
    return ImageSet(name, tuple(path for path, _ in pairs), thumbnails)


def _list_browsed_images(
    checked: Mapping[str, _CheckedSplit],
    logs: Mapping[str, ProblemLog],
    searches: Sequence[DuplicateSearch],
    audits: Sequence[SplitAudit],
) -> list[BrowsedImage]:
    """Return all images with their problems."""
    images: list[BrowsedImage] = []
    for split, one in checked.items():
        log = logs[split]
        images += list_browsed_images(split, one.samples, one.sizes_hw, log.problems.values(), log.unused)
    add_duplicates(images, searches)
    add_findings(images, audits)
    return images


def _raise_unless_labels(error: DataError) -> None:
    """Raise errors about images, not those about labels: only the images are compared."""
    if not isinstance(error, DatasetError):
        raise error


def _load_references(datasets: Sequence[str]) -> list[ImageSet]:
    """Read all images of the datasets of --against."""
    references = []
    for data in datasets:
        for split in list_splits(data):
            samples = load_dataset(data, split, _raise_unless_labels)
            log_stage(f"{data} {split}: decode {len(samples):,} images")
            references.append(make_image_set(f"{data} {split}", samples, inspect_images(samples, raise_error)))
    return references


def _check_splits(
    data: str,
    checked: Mapping[str, _CheckedSplit],
    logs: Mapping[str, ProblemLog],
    searches: Sequence[DuplicateSearch],
) -> None:
    """Report a missing split val, splits without persons, and images that belong to two splits."""
    if "val" not in checked:
        message = (
            f"{data}: no split val, and too few training images to use a part of them by default. Training stops. "
            "Add `val: DIR` or `val_ratio: 0.2`."
        )
        logs[next(iter(logs))].add(DatasetError(message, "no_val_split", data, is_error=False))
    for split, one in checked.items():
        summary = one.report.summary
        has_error = bool(logs[split].list_lines(is_error=True))  # can be the reason
        if summary.num_images and not summary.num_gt and split != "test" and not has_error:
            message = f"{data}: the split {split} has no person to detect. Set `category`, or correct the labels."
            logs[split].add(DatasetError(message, "no_persons", data, summary.num_images))
    for first, second in combinations(checked, 2):
        common = find_common_images(checked[second].samples, checked[first].samples)
        counts = f"{len(common)} of {len(checked[second].samples)} images of {second}"
        if common:
            message = f"{data}: {counts} are also in {first}. Measure on images that are not trained on."
            paths = [sample.path for sample in common]
            kind = f"same_images_in_{first}"
            logs[second].add(DatasetError(message, kind, data, len(common), is_error=False, images=paths))
    for search in searches:
        if search.pairs and search.first is not search.second and search.second.name in logs:
            num_similar = len({pair.first for pair in search.pairs})
            message = (
                f"{data}: {num_similar} of {len(search.first.paths)} images of {search.first.name} are near-duplicates "
                f"of images of {search.second.name}. See duplicates.json, and measure on other images."
            )
            kind = f"near_duplicates_in_{search.second.name}"
            logs[search.first.name].add(DatasetError(message, kind, data, num_similar, is_error=False))


def _check_duplicates(splits: Sequence[ImageSet], against: Sequence[str], output_dir: Path) -> list[DuplicateSearch]:
    """Search near-duplicates, print the figures and write duplicates.json."""
    references = _load_references(against)
    log_stage("search near-duplicates")
    searches = search_duplicates(splits, references)
    write_duplicates_json(output_dir / "duplicates.json", searches)
    rows = [(escape_nonprintable(search.title), search.summary) for search in searches]
    print(f"near-duplicates\n{textwrap.indent(format_table(rows, left_columns=2), '  ')}")
    return searches


def _make_duplicate_report(search: DuplicateSearch) -> DuplicateReport:
    sheet = encode_sheet(draw_duplicates(search), ".jpg") if search.pairs else b""
    return DuplicateReport(escape_nonprintable(search.title), search.summary, sheet)


def _print_problems(errors: Sequence[str], warnings: Sequence[str], output_dir: Path) -> None:
    for noun, lines in (("warning", warnings), ("error", errors)):
        if not lines:
            continue
        print(f"\n{len(lines):,} {noun}{'' if len(lines) == 1 else 's'}")
        for line in lines[:MAX_PRINTED]:
            print(f"  {line}")
        if len(lines) > MAX_PRINTED:
            where = output_dir / ("errors.txt" if noun == "error" else "index.html")
            print(f"  ... and {len(lines) - MAX_PRINTED:,} more: {where}")
    if not errors:
        print("\nno errors")
    print(f"saved {output_dir / 'index.html'}")
