"""Miss rate of a dense teacher when it sees more views of an image, as `--distill dense` can show it to the teacher.

    python benchmarks/studies/teacher_views.py --weights yolox_nano.onnx --data DATA.yaml --imgsz 320x320

Prints one row per view. Several data files with the same images, such as two versions of the annotations, give columns.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.dense import forward_views
from hkd_det.letterbox import parse_imgsz
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.base import BaseDetector
from hkd_det.models.zoo import load_detector
from hkd_det.ops.boxes import batched_nms
from hkd_det.train.engine import predict_dataset

IOU_THRESHOLD = 0.6


class ViewDetector(nn.Module):
    """A dense detector that combines several views of each image."""

    def __init__(self, detector: BaseDetector, flip: bool, double_resolution: bool) -> None:
        super().__init__()
        self.detector, self.flip, self.double_resolution = detector, flip, double_resolution

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Combine the views and suppress duplicates."""
        images = images.float()
        outputs = self.detector(images)
        (branch, *_) = forward_views(self.detector, images, outputs, self.flip, self.double_resolution)
        return batched_nms(branch.boxes_xyxy, branch.logits.sigmoid(), max_det, IOU_THRESHOLD)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="dense detector, as for hkd-train --teacher")
    parser.add_argument("--data", required=True, nargs="+", help="data files; their val splits have the same images")
    parser.add_argument("--imgsz", default="320x320", help="input size of the student (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    detector = load_detector(flags.weights).to(memory_format=torch.channels_last)
    versions = [load_dataset(data, "val") for data in flags.data]
    print(
        "| view | " + " | ".join(Path(data).stem for data in flags.data) + " |\n" + "| --- " * (len(versions) + 1) + "|"
    )
    for name, flip, double in (
        ("one view", False, False),
        ("flip", True, False),
        ("double resolution", False, True),
        ("both", True, True),
    ):
        views = ViewDetector(detector, flip, double).eval()
        detections = predict_dataset(views, versions[0], parse_imgsz(flags.imgsz), bf16=False)  # type: ignore[arg-type]  # only predict is used
        rates = [evaluate_detections(samples, detections, [SETUPS["All"]])["All"].value for samples in versions]
        print(f"| {name} | " + " | ".join(f"{100 * rate:.2f} %" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
