"""Calibration ranges and the selection of calibration images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hkd_deploy.precision.cli import load_calibration_samples
from hkd_deploy.precision.int8 import CALIBRATION_METHODS, calibrate
from hkd_deploy.precision.model import read_fp32_model
from hkd_det.errors import DataError, UsageError
from hkd_det.image import read_image


def test_calibrate_returns_range_of_each_layer_input(box_net: Callable[..., Path], street: Path) -> None:
    samples = load_calibration_samples(str(street), 6)
    ranges = calibrate(read_fp32_model(box_net()), ("first_node", "second_node"), samples)
    brightest = max(float(read_image(sample.path).max()) for sample in samples) / 255
    assert ranges["minmax"] == pytest.approx({"normal": brightest, "first_relu": brightest}, rel=1e-5)
    for method in CALIBRATION_METHODS:
        assert set(ranges[method]) == {"normal", "first_relu"}
        assert all(0 < ranges[method][name] <= brightest * 1.02 for name in ranges[method])


def test_load_calibration_samples_is_seeded_and_warns_if_few(street: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (load_calibration_samples(str(street), 4) for _ in range(2))
    assert [sample.path for sample in first] == [sample.path for sample in again]
    assert len({sample.path for sample in first}) == 4 and all("train" in str(sample.path) for sample in first)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "4 calibration images" in warnings[0] and "300" in warnings[0]


def test_load_calibration_samples_without_images_raises(tmp_path: Path, street: Path) -> None:
    with pytest.raises(DataError, match=r"calibration images: .*none\.yaml.*--calib-data"):
        load_calibration_samples(str(tmp_path / "none.yaml"), 4)
    with pytest.raises(UsageError, match="--calib-images: expected at least 1, got 0"):
        load_calibration_samples(str(street), 0)
