"""Precision and recall of the label audit, on labels checked by hand and on labels that are wrong on purpose.

    python benchmarks/studies/label_audit.py --data DIR --audit MODEL[,MODEL...] [--audit-config YAML[,YAML...]]

DIR contains `inria/` and `people/` (COCO files with the annotations and audited ignore regions of INRIA test and of the
validation images of `people`). Tables: missing labels compared with the audited regions, by score; removed, moved and
false labels that are found, over ten random selections.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.audit import SplitAudit, audit_split
from hkd_det.datasets.audit_run import detect_with_cache, open_audit_models
from hkd_det.datasets.coco import read_coco
from hkd_det.files import read_json
from hkd_det.structures import Detections, GroundTruth, Sample, box_area, box_intersection, box_iou, xyxy_from_xywh

SCORES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
NUM_SEEDS = 10
RATIO = 0.1  # of the labels that are removed, moved, or added
Boxes = NDArray[np.floating]


@dataclass(frozen=True)
class AuditedDataset:
    """A split whose missing people are known.

    Attributes:
        samples: Samples with the original labels only.
        person_regions: For each sample, the boxes of people without label.
        unsure_regions: For each sample, regions in which a person is possible.
    """

    samples: list[Sample]
    person_regions: list[Boxes]
    unsure_regions: list[Boxes]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of inria/ and people/")
    parser.add_argument("--audit", required=True, help="ONNX detectors, comma-separated")
    parser.add_argument("--audit-config", default="", help="model configuration of each detector, comma-separated")
    arguments = parser.parse_args(argv)
    configs = [Path(name) if name else None for name in arguments.audit_config.split(",")]
    paths = [Path(name) for name in arguments.audit.split(",")]
    models = open_audit_models(paths, configs if arguments.audit_config else [], "cpu")
    for title, annotations, images in (
        ("INRIA test", "inria/test_audited.json", "inria"),
        ("people val", "people/val_audited.json", "people"),
    ):
        dataset = load_audited_dataset(arguments.data / annotations, arguments.data / images)
        with tempfile.TemporaryDirectory() as directory:
            caches = [Path(directory) / f"{number}.npz" for number in range(len(models))]
            detections = detect_with_cache(models, dataset.samples, caches)
        print(f"\n## {title}, {', '.join(model.name for model in models)}\n")
        print_figures(audit_split(title, dataset.samples, detections))
        print_missing(dataset, detections)
        print_planted(dataset, detections)


def load_audited_dataset(annotations: Path, images: Path) -> AuditedDataset:
    """Load a COCO file with ignore regions of `source` "audit".

    Args:
        annotations: COCO file.
        images: Directory of its images.

    Returns:
        Labels and regions.
    """
    people: dict[int | str, list[list[float]]] = {}
    unsure: dict[int | str, list[list[float]]] = {}
    for record in read_json(annotations)["annotations"]:
        if record.get("source") == "audit":
            regions = unsure if record["certainty"] == "unsure" else people
            regions.setdefault(record["image_id"], []).append(record["bbox"])
    samples = read_coco(annotations, images)
    return AuditedDataset(
        [
            replace(sample, ground_truth=select_rows(sample.ground_truth, ~sample.ground_truth.ignore))
            for sample in samples
        ],
        [xyxy_from_xywh(np.array(people.get(sample.image_id, []))) for sample in samples],
        [xyxy_from_xywh(np.array(unsure.get(sample.image_id, []))) for sample in samples],
    )


def select_rows(ground_truth: GroundTruth, mask: NDArray[np.bool_]) -> GroundTruth:
    """Return the annotations that a mask selects.

    Args:
        ground_truth: Annotations of an image.
        mask (array[N], bool): True for the annotations to keep.
    """
    labels = tuple(label for label, keep in zip(ground_truth.labels, mask, strict=True) if keep)
    boxes, visible = ground_truth.boxes_xyxy[mask], ground_truth.visible_xyxy[mask]
    return GroundTruth(boxes, ground_truth.ignore[mask], visible, labels)


def make_ground_truth(labels: Sequence[Boxes], regions: Boxes) -> GroundTruth:
    """Return the ground truth of labels and ignore regions.

    Args:
        labels: Boxes (array[4] each), xyxy.
        regions (array[N, 4]): Ignore regions, xyxy.
    """
    boxes = np.concatenate([np.array(labels).reshape(-1, 4), regions.reshape(-1, 4)]).astype(np.float32)
    ignore = np.arange(len(boxes)) >= len(labels)
    return GroundTruth(boxes, ignore, boxes, ("person",) * len(boxes))


def print_figures(audit: SplitAudit) -> None:
    """Print the figures of the split.

    Args:
        audit: Result of the split.
    """
    ious = np.array(audit.found_ious)
    print(
        f"{audit.num_labels} labels, {len(ious) / audit.num_labels:.1%} found, median IoU {np.median(ious):.2f}, "
        f"{(ious >= 0.75).mean():.0%} from 0.75; {len(audit.select('location'))} bad locations, "
        f"{len(audit.select('improbable'))} improbable\n"
    )


def print_missing(dataset: AuditedDataset, detections: Sequence[Sequence[Detections]]) -> None:
    """Print precision and recall of the missing labels by minimum score.

    Args:
        dataset: Labels and regions.
        detections: For each model, the detections of each sample.
    """
    audit = audit_split("", dataset.samples, detections, min(SCORES))
    index_by_id = {sample.image_id: index for index, sample in enumerate(dataset.samples)}
    rows = []  # score, in a person region, in an unsure region
    best_scores = [np.zeros(len(regions)) for regions in dataset.person_regions]
    for finding in audit.select("missing"):
        index, box = index_by_id[finding.image_id], np.array([finding.proposal_xyxy])
        people, unsure = dataset.person_regions[index], dataset.unsure_regions[index]
        rows.append((finding.score, is_in_region(box, people), is_in_region(box, unsure)))
        if len(people):
            matches = box_iou(box, people)[0] >= 0.5
            best_scores[index][matches] = np.maximum(best_scores[index][matches], finding.score)
    scores, person, unsure_only = np.array(rows).T
    unsure_only = unsure_only * (1 - person)
    region_scores = np.concatenate(best_scores)
    print("| minimum score | findings | people | unsure | precision | recall |\n| --- | --- | --- | --- | --- | --- |")
    for limit in SCORES:
        keep = scores >= limit
        num, num_person, num_unsure = int(keep.sum()), int(person[keep].sum()), int(unsure_only[keep].sum())
        precision = num_person / max(1, num - num_unsure)
        recall = (region_scores >= limit).mean()
        print(f"| {limit:g} | {num} | {num_person} | {num_unsure} | {precision:.2f} | {recall:.2f} |")
    print(f"\n{len(region_scores)} regions of people\n")


def is_in_region(box: Boxes, regions: Boxes) -> bool:
    """Return whether a box matches a region: an IoU, or a fraction inside the region, of at least 0.5.

    Args:
        box (array[1, 4]): xyxy.
        regions (array[N, 4]): xyxy.
    """
    inside = box_intersection(box, regions) / box_area(box)[:, None]
    return bool(np.maximum(box_iou(box, regions), inside).max(initial=0) >= 0.5)


def print_planted(dataset: AuditedDataset, detections: Sequence[Sequence[Detections]]) -> None:
    """Print recall and precision for removed, moved and false labels; the audited regions are ignored.

    Args:
        dataset: Labels and regions.
        detections: For each model, the detections of each sample.
    """
    print("| labels | minimum score | planted | findings | recall | precision |\n| --- | --- | --- | --- | --- | --- |")
    for name, limit in (("removed", 0.2), ("removed", 0.3), ("removed", 0.5), ("moved", 0.3), ("false", 0.3)):
        results = np.array([plant(dataset, detections, name, limit, seed) for seed in range(NUM_SEEDS)])
        planted, _, findings = results.mean(0)
        recall, precision = results[:, 1] / results[:, 0], results[:, 1] / results[:, 2]
        print(
            f"| {name} | {limit:g} | {planted:.0f} | {findings:.0f} | {recall.mean():.2f} ± {recall.std():.2f} | "
            f"{precision.mean():.2f} ± {precision.std():.2f} |"
        )


def plant(
    dataset: AuditedDataset, detections: Sequence[Sequence[Detections]], name: str, min_score: float, seed: int
) -> tuple[int, int, int]:
    """Change a tenth of the labels and audit them.

    Args:
        dataset: Labels and regions.
        detections: For each model, the detections of each sample.
        name: "removed", "moved" (IoU of 0.33 to 0.54 with the person), or "false" (a label of the same size anywhere).
        min_score: Minimum score of a proposal.
        seed: Random seed.

    Returns:
        Number of changed labels, of those that are found, and of all findings of the kind.
    """
    rng = np.random.default_rng(seed)
    samples, targets = [], []
    for index, sample in enumerate(dataset.samples):
        labels: list[Boxes] = []
        changed: list[Boxes] = []
        for box in sample.ground_truth.boxes_xyxy:
            new = change_label(box, sample, name, rng) if rng.random() < RATIO else None
            if new is not None:
                changed.append(new)
            labels += [box] if new is None or name == "false" else []
            labels += [new] if new is not None and name != "removed" else []
        regions = np.concatenate([dataset.person_regions[index], dataset.unsure_regions[index]])
        samples.append(replace(sample, ground_truth=make_ground_truth(labels, regions)))
        targets.append(np.array(changed).reshape(-1, 4))
    kind = {"removed": "missing", "moved": "location", "false": "improbable"}[name]
    findings = [one for one in audit_split("", samples, detections, min_score).findings if one.kind == kind]
    places: dict[int | str, list[tuple[float, ...]]] = {}
    for one in findings:
        places.setdefault(one.image_id, []).append(one.label_xyxy or one.proposal_xyxy or ())
    found = 0
    for sample, boxes in zip(samples, targets, strict=True):
        overlaps = box_iou(boxes, np.array(places.get(sample.image_id, [])).reshape(-1, 4))
        found += int((overlaps.max(1, initial=0) >= 0.5).sum())
    return sum(map(len, targets)), found, len(findings)


def change_label(box: Boxes, sample: Sample, name: str, rng: np.random.Generator) -> Boxes | None:
    """Return the changed box, or None if a false label would be near another one.

    Args:
        box (array[4]): Label, xyxy.
        sample: Sample of the image.
        name: As in `plant`.
        rng: Random generator.
    """
    width, height = box[2:] - box[:2]
    if name == "removed":
        return box
    if name == "moved":
        shift = rng.uniform(0.3, 0.5) * rng.choice([-1, 1])
        return box + np.array([shift * width, 0, shift * width, 0])
    assert sample.size_hw is not None
    left, top = rng.uniform(0, max(1, sample.size_hw[1] - width)), rng.uniform(0, max(1, sample.size_hw[0] - height))
    moved = np.array([left, top, left + width, top + height])
    return moved if box_iou(moved[None], sample.ground_truth.boxes_xyxy).max() < 0.05 else None


if __name__ == "__main__":
    main()
