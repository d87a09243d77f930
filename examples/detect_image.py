"""Run a model on an image: `python examples/detect_image.py MODEL.onnx IMAGE OUTPUT.png`."""

import sys

import cv2

from hkd_deploy import open_detector


def main(model: str, image: str, output: str) -> None:
    """Detect persons, print their boxes, and write the image with boxes."""
    detector = open_detector(model, device="cpu")
    detections = detector(image, conf=detector.default_conf)
    for (x1, y1, x2, y2), score in detections:
        print(f"{score:.2f}  x {x1:.0f}-{x2:.0f}  y {y1:.0f}-{y2:.0f}")
    cv2.imwrite(output, cv2.cvtColor(detections.plot(), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main(*sys.argv[1:4])
