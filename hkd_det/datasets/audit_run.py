"""The label audit of `hkd-train --check --audit`: detections of all models, all splits, report and audited annotations.

Detections are cached on disk.
"""

import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hkd_det.console import Progress, format_table, log_stage
from hkd_det.datasets.audit import (
    PROPOSAL_SCORE,
    AuditModel,
    SplitAudit,
    audit_split,
    find_rotated,
    select_rotation_candidates,
)
from hkd_det.datasets.audit_report import (
    AuditedAs,
    make_audit_rows,
    write_audit_json,
    write_audit_page,
    write_audited_split,
    write_audited_yaml,
)
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, bytes_sha256
from hkd_det.image import read_image
from hkd_det.onnxrt.detector import open_onnx_detector
from hkd_det.onnxrt.openvino import hash_model_files, is_openvino_model
from hkd_det.structures import Detections, GroundTruth, Sample, rotate_boxes

ReadableSample = tuple[Sample, tuple[int, int]]  # with height and width of the image in pixels
MIN_DETECTION_SCORE = 0.01  # a label is improbable only if the models detect nothing even at such scores
IMAGES_PER_CHUNK = 8
NUM_THREADS = 4  # that decode images; OpenCV releases the GIL


@dataclass(frozen=True)
class AuditOptions:
    """Options of the label audit.

    Attributes:
        models: ONNX files and OpenVINO models.
        config_paths: Model configuration of each detector; None for its metadata or the YAML file next to it.
        device: "cpu", "cuda" or "cuda:N".
        min_score: Minimum score of a probable missing label, 0 to 1.
        write_audited: Output file of --write-audited; empty to write none.
        audited_as: How missing people are added to that file; "detections" ignores the labels of the dataset.
    """

    models: tuple[Path, ...]
    config_paths: tuple[Path | None, ...] = ()
    device: str = "cpu"
    min_score: float = PROPOSAL_SCORE
    write_audited: str = ""
    audited_as: AuditedAs = "ignore"


def run_audit(
    data: str,
    readable: Mapping[str, Sequence[ReadableSample]],
    models: Sequence[AuditModel],
    options: AuditOptions,
    output_dir: Path,
) -> list[SplitAudit]:
    """Audit the labels of all splits with readable images, print the figures, and write page and JSON file.

    Args:
        data: Name of the dataset.
        readable: Samples of each split.
        models: The detectors.
        options: Options of the audit.
        output_dir: Directory of the report.

    Returns:
        Result of each split with readable images.

    Raises:
        DataError: No split has readable images.
    """
    samples = {split: [sample for sample, _ in pairs] for split, pairs in readable.items() if pairs}
    if options.audited_as == "detections":  # every detection is a person without label
        samples = {
            split: [replace(sample, ground_truth=GroundTruth.empty()) for sample in split_samples]
            for split, split_samples in samples.items()
        }
    if not samples:
        raise DataError(f"--data {data}: --audit: contains no readable images. Add images, or repair the errors above.")
    audits = []
    for split, split_samples in samples.items():
        caches = [output_dir / f"detections_{split}_{number}.npz" for number in range(1, len(models) + 1)]
        detections = detect_with_cache(models, split_samples, caches)
        audit = audit_split(split, split_samples, detections, options.min_score)
        candidates = [split_samples[index] for index in select_rotation_candidates(split_samples, detections)]
        rotated = {
            90 * turns: detect_with_cache(
                models, candidates, [path.with_stem(f"{path.stem}_rotated_{90 * turns}") for path in caches], turns
            )
            for turns in (1, 2, 3)
        }
        audits.append(replace(audit, findings=(*audit.findings, *find_rotated(candidates, rotated))))
        rows = format_table(make_audit_rows(audits[-1], len(models)), left_columns=2)
        print(f"\n{split}: label audit with {', '.join(model.name for model in models)}\n{textwrap.indent(rows, '  ')}")
    write_audit_json(output_dir / "audit.json", data, models, audits, options.min_score)
    page = output_dir / "audit.html"
    write_audit_page(page, escape_nonprintable(data), models, audits, list(samples.values()))
    print(f"\nsaved {page} and audit.json")
    return audits


def write_audited(
    data: str,
    readable: Mapping[str, Sequence[ReadableSample]],
    audits: Sequence[SplitAudit],
    paths: Mapping[str, Path],
    options: AuditOptions,
    output_dir: Path,
) -> None:
    """Write the annotations of each split with the missing people, and a data YAML that names the files.

    Args:
        data: Name of the dataset.
        readable: Samples of each split.
        audits: Result of each split.
        paths: Output file of each split.
        options: Options of the audit.
        output_dir: Directory of the data YAML.
    """
    written = {}
    for audit in audits:
        path, pairs = paths[audit.split], readable[audit.split]
        split = write_audited_split(path, data, audit.split, pairs, audit.select("missing"), options.audited_as)
        print(f"saved {path}: {split.num_labels:,} labels and {split.num_ignore_regions:,} ignore regions added")
        written[audit.split] = split
    yaml_path = output_dir / "audited.yaml"
    write_audited_yaml(yaml_path, data, written)
    print(f"saved {yaml_path}. Use it as --data to train with these annotations.")


def open_audit_models(paths: Sequence[Path], config_paths: Sequence[Path | None], device: str) -> list[AuditModel]:
    """Open the detectors of an audit.

    Args:
        paths: ONNX files and OpenVINO models.
        config_paths: Model configuration of each file; None for its metadata or the YAML file next to it.
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        The opened detectors, with a score threshold of at most `MIN_DETECTION_SCORE`.

    Raises:
        UsageError: A file is named twice, or the number of configurations differs.
        DataError: A model or its configuration is missing or invalid.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    if config_paths and len(config_paths) != len(paths):
        raise UsageError(
            f"--audit-config: expected one YAML file for each of the {len(paths)} models of --audit, "
            f"got {len(config_paths)}. Leave an entry empty to use the YAML file next to the model."
        )
    if len(set(paths)) != len(paths):
        raise UsageError("--audit: a model is named twice. Name each model once.")
    models = []
    for path, config_path in zip(paths, config_paths or [None] * len(paths), strict=True):
        if path.suffix != ".onnx" and not is_openvino_model(path):
            raise UsageError(
                f"--audit {path}: expected an ONNX file or an OpenVINO model. Convert the model with hkd-export."
            )
        detector = open_onnx_detector(path, device, config_path)
        detector.config = replace(detector.config, conf=min(detector.config.conf, MIN_DETECTION_SCORE))
        models.append(AuditModel(path.stem, detector, hash_model_files(path)))
    return models


def detect_with_cache(
    models: Sequence[AuditModel], samples: Sequence[Sample], cache_paths: Sequence[Path], num_turns: int = 0
) -> list[list[Detections]]:
    """Run the models on all images. A model whose cache file fits is not run.

    Args:
        models: The detectors.
        samples: Samples whose images can be decoded.
        cache_paths: Cache file (.npz) of each model. It is valid for the same model, configuration and image files.
        num_turns: Rotate the images by this number of turns by 90 degrees, counterclockwise.

    Returns:
        For each model, the detections of each sample, in pixels of the stored image.
    """
    keys = [_compute_cache_key(model, samples, num_turns) for model in models]
    results = [_read_cache(path, key, len(samples)) for path, key in zip(cache_paths, keys, strict=True)]
    missing = [index for index, result in enumerate(results) if result is None]
    computed = _detect([models[index] for index in missing], samples, num_turns)
    for index, detections in zip(missing, computed, strict=True):
        _write_cache(cache_paths[index], keys[index], detections)
        results[index] = detections
    return [result for result in results if result is not None]


def _detect(models: Sequence[AuditModel], samples: Sequence[Sample], num_turns: int) -> list[list[Detections]]:
    """Decode each image once and run all models on it."""
    results: list[list[Detections]] = [[] for _ in models]
    if not models:
        return results
    names = ", ".join(model.name for model in models)
    rotated = f", rotated by {90 * num_turns} degrees" if num_turns else ""
    log_stage(f"audit {len(samples):,} images with {names}{rotated}")
    with (
        Progress(len(samples), f"audit with {names}", "image", delay_s=2) as progress,
        ThreadPoolExecutor(NUM_THREADS) as pool,
    ):
        for start in range(0, len(samples), IMAGES_PER_CHUNK):
            paths = [sample.path for sample in samples[start : start + IMAGES_PER_CHUNK]]
            images = [np.ascontiguousarray(np.rot90(image, num_turns)) for image in pool.map(read_image, paths)]
            sizes = [(image.shape[0], image.shape[1]) for image in images]
            for result, model in zip(results, models, strict=True):
                for detections, size_hw in zip(model.detector(images), sizes, strict=True):
                    boxes = rotate_boxes(detections.boxes_xyxy, 4 - num_turns, size_hw)
                    result.append(Detections(boxes, detections.scores))
            progress.update(len(images))
    return results


def _compute_cache_key(model: AuditModel, samples: Sequence[Sample], num_turns: int) -> str:
    """Return a digest of model, configuration, rotation, and path, size and modification time of each image."""
    stats = [(str(sample.path), sample.path.stat()) for sample in samples]
    images = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return bytes_sha256(
        repr((model.sha256, model.detector.config, num_turns, images)).encode("utf-8", "surrogateescape")
    )


def _read_cache(path: Path, key: str, num_images: int) -> list[Detections] | None:
    """Return the cached detections, or None if the file is missing, damaged or of another key."""
    try:
        with path.open("rb") as file, np.load(file) as content:  # np.load leaves a damaged file open
            if str(content["key"]) != key:
                return None
            rows, ends = content["rows"], np.cumsum(content["counts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(ends) != num_images or rows.shape != (ends[-1] if num_images else 0, 5):
        return None
    return [Detections(part[:, :4], part[:, 4]) for part in np.split(rows, ends[:-1])]


def _write_cache(path: Path, key: str, detections: Sequence[Detections]) -> None:
    rows = [np.column_stack([one.boxes_xyxy, one.scores]) for one in detections]
    with atomic_write(path) as temp_path:
        np.savez_compressed(
            temp_path,
            key=np.array(key),
            rows=np.concatenate(rows) if rows else np.zeros((0, 5), np.float32),
            counts=np.array([len(one) for one in detections], np.int64),
        )
