"""Miss rate and latency with and without the suppression of duplicate detections.

    python benchmarks/studies/duplicate_suppression.py --data DATA.yaml runs/a/best.pt runs/b/best.pt ...
        [--latency 640x512]
    python benchmarks/studies/duplicate_suppression.py --crowd citypersons/val_gt.json

Miss rates are MR^-2 Reasonable on the splits val and test (see real_data.yaml), at the training size of each detector.
The columns are all peaks of the one-to-one branch, the peaks without duplicates (as deployed), and the peaks after
torchvision's NMS at IoU 0.5. Latencies are those of two files exported from the first checkpoint, measured alternately.
--crowd counts the persons of an annotation file (COCO layout, setup Reasonable) that overlap another person by more
than `IOU_LIMITS`.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from hkd_bench.bench import BenchOptions, bench
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.letterbox import parse_imgsz
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco_files import read_coco_ground_truth
from hkd_det.models.checkpoint import DetectorCheckpoint, load_detector_checkpoint
from hkd_det.ops.boxes import IOU_LIMITS
from hkd_det.structures import Detections, box_iou, xyxy_from_xywh
from hkd_det.train.engine import predict_dataset

NUM_PARITY_IMAGES = 8  # images on which an exported file is compared with torch


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="best.pt files")
    parser.add_argument("--data", type=Path, help="data YAML with the splits val and test; required for checkpoints")
    parser.add_argument(
        "--crowd", type=Path, metavar="JSON", help="report the overlap of persons in an annotation file"
    )
    parser.add_argument("--latency", nargs="*", default=[], metavar="WxH", help="input sizes for the latency")
    arguments = parser.parse_args(argv)
    if arguments.crowd:
        print_crowd(arguments.crowd)
    if not arguments.checkpoints:
        return
    if arguments.data is None:
        parser.error("--data: required with checkpoints. Pass a data YAML.")
    splits = {split: load_dataset(str(arguments.data), split) for split in ("val", "test")}
    print("| | split | all peaks | without duplicates | NMS 0.5 |\n| --- | --- | --- | --- | --- |")
    for path in arguments.checkpoints:
        for split, samples in splits.items():
            rates = " | ".join(
                f"{100 * rate:.1f} %" for rate in compute_miss_rates(load_detector_checkpoint(path), samples)
            )
            print(f"| {path.parent} | {split} | {rates} |", flush=True)
    for size in arguments.latency:
        checkpoint = load_detector_checkpoint(arguments.checkpoints[0])
        ratio = measure_latency_ratio(checkpoint, parse_imgsz(size), arguments.data, splits["test"])
        print(f"\nlatency p50 at {size}, without duplicates / all peaks: {ratio:.3f}", flush=True)


def print_crowd(path: Path) -> None:
    """Print how many Reasonable persons have an IoU above `IOU_LIMITS` with another person.

    Args:
        path: Annotation file in COCO layout.
    """
    table = read_coco_ground_truth(path).table
    (min_height_px, _), (min_visible_ratio, _) = REASONABLE.height_px, REASONABLE.visible_ratio
    valid = ~table.ignore & (table.height_px >= min_height_px) & (table.visible_ratio >= min_visible_ratio)
    max_iou = np.zeros(len(valid))
    for image in range(table.num_images):
        rows = np.flatnonzero(valid & (table.image_index == image))
        boxes = xyxy_from_xywh(table.boxes_xywh[rows])
        iou = box_iou(boxes, boxes)
        np.fill_diagonal(iou, 0)
        max_iou[rows] = iou.max(1, initial=0)
    ratios = ", ".join(f"{100 * (max_iou[valid] > limit).mean():.1f} % above {limit}" for limit in IOU_LIMITS)
    print(f"{path}: highest IoU with another person, of {valid.sum()} persons: {ratios}")


def compute_miss_rates(checkpoint: DetectorCheckpoint, samples: Sequence[Sample]) -> list[float]:
    """Return MR^-2 of all peaks, of the peaks without duplicates, and of the peaks after NMS.

    Args:
        checkpoint: A trained detector.
        samples: Samples with ground truth.
    """
    imgsz_hw = tuple(checkpoint.config["imgsz_hw"])
    bf16 = checkpoint.config["precision"] == "bf16"
    detector = checkpoint.build()
    with disable_suppression():
        peaks = predict_dataset(detector, samples, imgsz_hw, bf16)
    variants = (peaks, predict_dataset(detector, samples, imgsz_hw, bf16), [apply_nms(image) for image in peaks])
    return [evaluate_detections(samples, variant, [REASONABLE])[REASONABLE.name].value for variant in variants]


@contextmanager
def disable_suppression() -> Iterator[None]:
    """Make the native detectors return all peaks inside the context."""

    def keep_all(boxes_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return boxes_xyxy, logits.sigmoid()

    with patch("hkd_det.models.detector.suppress_duplicates", keep_all):
        yield


def apply_nms(detections: Detections) -> Detections:
    """Apply hard NMS at the IoU threshold of the protocol.

    Args:
        detections: Detections of one image.
    """
    boxes, scores = torch.from_numpy(detections.boxes_xyxy).float(), torch.from_numpy(detections.scores).float()
    keep = nms(boxes, scores, 0.5).numpy()
    return Detections(detections.boxes_xyxy[keep], detections.scores[keep])


def measure_latency_ratio(
    checkpoint: DetectorCheckpoint, imgsz_hw: tuple[int, int], data: Path, samples: Sequence[Sample]
) -> float:
    """Return the ratio of the median CPU latencies with and without the suppression of duplicates.

    Args:
        checkpoint: A trained detector.
        imgsz_hw: Input height and width, pixels.
        data: Data YAML.
        samples: Images to measure on.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "suppressed.onnx", Path(folder) / "all.onnx"]
        images = [sample.path for sample in samples[:NUM_PARITY_IMAGES]]
        export_detector(checkpoint, files[0], ExportOptions(imgsz_hw), images)
        with disable_suppression():
            export_detector(checkpoint, files[1], ExportOptions(imgsz_hw), images)
        options = BenchOptions(data=str(data), split="test")
        suppressed, all_peaks = bench(files, samples, options, ["suppressed", "all"]).models
    return suppressed.latency.p50_ms / all_peaks.latency.p50_ms


if __name__ == "__main__":
    main()
