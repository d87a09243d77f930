"""Tests of the optimization profile: --trt-profile and metadata to three input shapes."""

from pathlib import Path

import pytest

from hkd_deploy.trt.engine_info import Profile, parse_profile, resolve_profile
from hkd_det.errors import DataError, UsageError

PATH = Path("student.onnx")
METADATA = {"imgsz": "[512, 640]"}


def resolve(shape: tuple[int, ...], text: str | None = None, metadata: dict[str, str] | None = None) -> Profile | None:
    requested = parse_profile(text) if text else None
    return resolve_profile(shape, requested, METADATA if metadata is None else metadata, PATH)


def test_static_graph_has_no_profile() -> None:
    assert resolve((1, 512, 640, 3)) is None


def test_free_batch() -> None:
    assert resolve((-1, 512, 640, 3)) == Profile((1, 512, 640, 3), (4, 512, 640, 3), (8, 512, 640, 3))
    assert resolve((-1, 512, 640, 3), "1, 2,3") == Profile((1, 512, 640, 3), (2, 512, 640, 3), (3, 512, 640, 3))


def test_free_size_default_follows_the_metadata() -> None:
    assert resolve((-1, -1, -1, 3)) == Profile((1, 128, 160, 3), (4, 512, 640, 3), (8, 512, 640, 3))
    larger = {**METADATA, "hkd.max_imgsz": "[1080, 1920]"}
    assert resolve((1, -1, -1, 3), metadata=larger) == Profile((1, 256, 480, 3), (1, 1080, 1920, 3), (1, 1080, 1920, 3))
    small = Profile((1, 32, 32, 3), (1, 64, 32, 3), (1, 64, 32, 3))
    assert resolve((1, -1, -1, 3), metadata={"imgsz": "[64, 32]"}) == small


def test_free_size_is_requested_as_width_x_height() -> None:
    expected = Profile((1, 256, 320, 3), (2, 512, 640, 3), (2, 512, 640, 3))
    assert resolve((-1, -1, -1, 3), "1x320x256,2x640x512,2x640x512") == expected


def test_channels_first() -> None:
    assert resolve((-1, 3, -1, -1)) == Profile((1, 3, 128, 160), (4, 3, 512, 640), (8, 3, 512, 640))


@pytest.mark.parametrize("text", ["1", "1,2", "1,2,3,4", "a,b,c", "0,1,2", "1x2,2x2,3x2", "-1,1,2", "1,,2"])
def test_parse_profile_of_another_form_raises(text: str) -> None:
    with pytest.raises(UsageError, match=r"--trt-profile .*: expected MIN,OPT,MAX"):
        parse_profile(text)


@pytest.mark.parametrize("text", ["2,1,3", "1,3,2", "1x64x64,1x32x64,1x64x64", "1,2x64x64,3x64x64"])
def test_parse_profile_that_does_not_ascend_raises(text: str) -> None:
    with pytest.raises(UsageError, match="expected three shapes of the same form in ascending order"):
        parse_profile(text)


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        ((1, 512, 640, 3), "1,1,1", "has the fixed shape .* Export it with --dynamic"),
        ((-1, 512, 640, 3), "1x320x256,1x640x512,1x640x512", "where -1 is free, got"),
        ((1, -1, -1, 3), "2x640x512,2x640x512,2x640x512", "where -1 is free, got"),
        ((-1, -1, -1, 3), "1,2,3", "has a free size. Set batch x width x height"),
    ],
)
def test_profile_that_contradicts_the_graph_raises(shape: tuple[int, ...], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(shape, text)


def test_free_size_without_metadata_raises() -> None:
    with pytest.raises(DataError, match=r"contains no largest input size\. Set --trt-profile"):
        resolve((1, -1, -1, 3), metadata={})
