"""The label audit of `hkd-train --check --audit`: all splits, report and audited annotations."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hkd_det.console import format_table
from hkd_det.datasets.audit import PROPOSAL_SCORE, SplitAudit, audit_split, find_rotated, select_rotation_candidates
from hkd_det.datasets.audit_coco import AuditedAs, write_audited_split, write_audited_yaml
from hkd_det.datasets.audit_models import AuditModel, detect_with_cache
from hkd_det.datasets.audit_report import make_audit_rows, write_audit_json, write_audit_page
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.errors import DataError
from hkd_det.structures import GroundTruth, Sample

ReadableSample = tuple[Sample, tuple[int, int]]  # with height and width of the image in pixels


@dataclass(frozen=True)
class AuditOptions:
    """Options of the label audit.

    Attributes:
        models: ONNX detectors.
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
