"""Calibration sees what a picture makes of each layer's input, on the same pictures in the same order every time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hkd_deploy.precision.calibration import CALIBRATION_METHODS, calibrate, load_calibration_samples
from hkd_deploy.precision.model import read_fp32_model
from hkd_det.errors import DataError, UsageError
from hkd_det.image import read_image


def test_reach_is_the_largest_value_that_enters_a_layer(box_net: Callable[..., Path], street: Path) -> None:
    samples = load_calibration_samples(str(street), 6)
    found = calibrate(read_fp32_model(box_net()), ("first_node", "second_node"), samples)
    brightest = max(float(read_image(sample.path).max()) for sample in samples) / 255
    assert found["minmax"] == pytest.approx({"normal": brightest, "first_relu": brightest}, rel=1e-5)
    for method in CALIBRATION_METHODS:
        assert set(found[method]) == {"normal", "first_relu"}
        assert all(0 < found[method][name] <= brightest * 1.02 for name in found[method])


def test_the_same_pictures_every_time_and_a_word_where_they_are_few(
    street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (load_calibration_samples(str(street), 4) for _ in range(2))
    assert [sample.path for sample in first] == [sample.path for sample in again]
    assert len({sample.path for sample in first}) == 4 and all("train" in str(sample.path) for sample in first)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "4 pictures to calibrate on" in said[0] and "300" in said[0]


def test_missing_pictures_say_what_to_do(tmp_path: Path, street: Path) -> None:
    with pytest.raises(DataError, match=r"no pictures to calibrate on: .*no such data yaml.*--calib"):
        load_calibration_samples(str(tmp_path / "none.yaml"), 4)
    with pytest.raises(UsageError, match="--calib-images 0: at least 1"):
        load_calibration_samples(str(street), 0)
