"""What leaving out doubles brings and costs: miss rates and latency of trained detectors with and without it.

    python benchmarks/studies/doubles.py runs/a/best.pt runs/b/best.pt ... [--latency 640x512]
    python benchmarks/studies/doubles.py --crowd ../shared/data/citypersons/val_gt.json

Miss rates are MR^-2 Reasonable on val and test of the real pictures (real_data.yaml), at the size each detector was
trained at: as its `one` branch's peaks say, less doubles (as deployed), and after torchvision's NMS at IoU 0.5. The
latencies are those of two files exported from the first checkpoint, in turn in one run. --crowd tells how many of an
annotation file's people (COCO's layout, setup Reasonable) share more of a union with another person than `SAME`.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from distillation_plan import DATA
from torch import Tensor
from torchvision.ops import nms

from hkd_bench.bench import BenchOptions, bench
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.export.options import ExportOptions
from hkd_det.boxes import box_iou, xyxy_from_xywh
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.letterbox import parse_imgsz
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco import read_coco_ground_truth
from hkd_det.models.checkpoint import DetectorCheckpoint, load_detector_checkpoint
from hkd_det.ops.nms import IOU_LIMITS
from hkd_det.structures import Detections
from hkd_det.train.engine import predict_dataset

VERIFIED = 8  # pictures on which an exported file is compared with torch


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--crowd", type=Path, metavar="JSON", help="tell of an annotation file how close people stand")
    parser.add_argument("--latency", nargs="*", default=[], metavar="WxH", help="sizes of the input to time")
    arguments = parser.parse_args(argv)
    if arguments.crowd:
        print_crowd(arguments.crowd)
    if not arguments.checkpoints:
        return
    splits = {split: load_dataset(str(DATA), split) for split in ("val", "test")}
    print("| | split | all peaks | less doubles | NMS 0.5 |\n| --- | --- | --- | --- | --- |")
    for path in arguments.checkpoints:
        for split, samples in splits.items():
            rates = " | ".join(f"{100 * rate:.1f} %" for rate in miss_rates(load_detector_checkpoint(path), samples))
            print(f"| {path.parent} | {split} | {rates} |", flush=True)
    for size in arguments.latency:
        share = latency_share(load_detector_checkpoint(arguments.checkpoints[0]), parse_imgsz(size), splits["test"])
        print(f"\nlatency p50 at {size}, less doubles over all peaks: {share:.3f}", flush=True)


def print_crowd(path: Path) -> None:
    """How many Reasonable people overlap another by more than the ends of `SAME`."""
    table = read_coco_ground_truth(path).table
    (low, _), (visible, _) = REASONABLE.height_px, REASONABLE.visible_ratio
    real = ~table.ignore & (table.height_px >= low) & (table.visible_ratio >= visible)
    most = np.zeros(len(real))
    for picture in range(table.num_images):
        mine = np.flatnonzero(real & (table.image_index == picture))
        boxes = xyxy_from_xywh(table.boxes_xywh[mine])
        shared = box_iou(boxes, boxes)
        np.fill_diagonal(shared, 0)
        most[mine] = shared.max(1, initial=0)
    shares = ", ".join(f"{100 * (most[real] > end).mean():.1f} % more than {end}" for end in IOU_LIMITS)
    print(f"{path}: of {real.sum()} people, {shares} of a union with another")


def miss_rates(checkpoint: DetectorCheckpoint, samples: Sequence[Sample]) -> list[float]:
    """Of all peaks, less doubles, and after NMS."""
    imgsz_hw = tuple(checkpoint.config["imgsz_hw"])
    bf16 = checkpoint.config["precision"] == "bf16"
    detector = checkpoint.build()
    with all_peaks():
        peaks = predict_dataset(detector, samples, imgsz_hw, bf16)
    found = (peaks, predict_dataset(detector, samples, imgsz_hw, bf16), [suppressed(one) for one in peaks])
    return [evaluate_detections(samples, one, [REASONABLE])[REASONABLE.name].value for one in found]


@contextmanager
def all_peaks() -> Iterator[None]:
    """Our detectors as if nobody left doubles out."""

    def plain(boxes_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return boxes_xyxy, logits.sigmoid()

    with patch("hkd_det.models.detector.ranked", plain):
        yield


def suppressed(found: Detections) -> Detections:
    """Hard suppression at the protocol's own overlap."""
    kept = nms(torch.from_numpy(found.boxes_xyxy).float(), torch.from_numpy(found.scores).float(), 0.5).numpy()
    return Detections(found.boxes_xyxy[kept], found.scores[kept])


def latency_share(checkpoint: DetectorCheckpoint, imgsz_hw: tuple[int, int], samples: Sequence[Sample]) -> float:
    """p50 from a frame to its people, with doubles left out over without, on this machine's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "less.onnx", Path(folder) / "all.onnx"]
        pictures = [sample.path for sample in samples[:VERIFIED]]
        export_detector(checkpoint, files[0], ExportOptions(imgsz_hw), pictures)
        with all_peaks():
            export_detector(checkpoint, files[1], ExportOptions(imgsz_hw), pictures)
        less, every = bench(files, samples, BenchOptions(data=str(DATA), split="test"), ["less", "all"]).models
    return less.latency.p50_ms / every.latency.p50_ms


if __name__ == "__main__":
    main()
