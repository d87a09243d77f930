"""Run the example of docs/how-to/add-a-backend.md."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkd_deploy import open_detector
from hkd_deploy.backends import BACKENDS

GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "add-a-backend.md"


def test_guide_example_equals_onnxruntime(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    define, use = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    path = tiny_onnx("student.onnx")
    image_rgb = np.random.default_rng(0).integers(0, 200, (120, 90, 3), dtype=np.uint8)
    image_rgb[30:90, 20:60] = 255
    monkeypatch.chdir(path.parent)
    monkeypatch.setitem(BACKENDS, "reference", BACKENDS["onnxruntime"])  # removes the row after the test
    namespace: dict[str, Any] = {"image_rgb": image_rgb}
    exec(define + use, namespace)
    assert namespace["detector"].backend == "reference"
    with open_detector(path) as detector:
        expected = detector(image_rgb)
    assert len(expected) == 1
    np.testing.assert_allclose(namespace["detections"].boxes_xyxy, expected.boxes_xyxy)
    np.testing.assert_allclose(namespace["detections"].scores, expected.scores, rtol=1e-6)
