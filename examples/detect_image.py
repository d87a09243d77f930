"""Run a model on an image: `python examples/detect_image.py MODEL.onnx IMAGE OUTPUT.png`."""

import sys
from pathlib import Path

import cv2

from hkd_deploy import open_detector
from hkd_det.draw import draw_detections
from hkd_det.image import read_image


def main(model: str, image: str, output: str) -> None:
    """Detect persons, print their boxes, and write the image with boxes."""
    image_rgb = read_image(Path(image))
    with open_detector(model, device="cpu") as detector:
        detections = detector(image_rgb).filter(min_score=0.3)
    for (x1, y1, x2, y2), score in zip(detections.boxes_xyxy, detections.scores, strict=True):
        print(f"{score:.2f}  x {x1:.0f}-{x2:.0f}  y {y1:.0f}-{y2:.0f}")
    cv2.imwrite(output, cv2.cvtColor(draw_detections(image_rgb, detections), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main(*sys.argv[1:4])
