"""From --profile and the file's metadata to three input shapes."""

from pathlib import Path

import pytest

from hkd_deploy.trt.profile import Profile, parse_profile, resolve_profile
from hkd_det.errors import DataError, UsageError

PATH = Path("student.onnx")
SAID = {"imgsz": "[512, 640]"}


def shapes(shape: tuple[int, ...], text: str | None = None, said: dict[str, str] | None = None) -> Profile | None:
    return resolve_profile(shape, parse_profile(text) if text else None, SAID if said is None else said, PATH)


def test_a_fixed_graph_needs_none() -> None:
    assert shapes((1, 512, 640, 3)) is None


def test_a_free_batch() -> None:
    assert shapes((-1, 512, 640, 3)) == Profile((1, 512, 640, 3), (4, 512, 640, 3), (8, 512, 640, 3))
    assert shapes((-1, 512, 640, 3), "1, 2,3") == Profile((1, 512, 640, 3), (2, 512, 640, 3), (3, 512, 640, 3))


def test_a_free_size_is_width_x_height_and_up_to_what_the_file_names() -> None:
    assert shapes((-1, -1, -1, 3)) == Profile((1, 128, 160, 3), (4, 512, 640, 3), (8, 512, 640, 3))
    larger = {**SAID, "hkd.max_hw": "[1080, 1920]"}
    assert shapes((1, -1, -1, 3), said=larger) == Profile((1, 256, 480, 3), (1, 1080, 1920, 3), (1, 1080, 1920, 3))
    assert shapes((1, -1, -1, 3), said={"imgsz": "[64, 32]"}) == Profile((1, 32, 32, 3), (1, 64, 32, 3), (1, 64, 32, 3))
    wanted = Profile((1, 256, 320, 3), (2, 512, 640, 3), (2, 512, 640, 3))
    assert shapes((-1, -1, -1, 3), "1x320x256,2x640x512,2x640x512") == wanted


def test_channels_first() -> None:
    assert shapes((-1, 3, -1, -1)) == Profile((1, 3, 128, 160), (4, 3, 512, 640), (8, 3, 512, 640))


@pytest.mark.parametrize("text", ["1", "1,2", "1,2,3,4", "a,b,c", "0,1,2", "1x2,2x2,3x2", "-1,1,2", "1,,2"])
def test_a_profile_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--profile .*: expected smallest,usual,largest"):
        parse_profile(text)


@pytest.mark.parametrize("text", ["2,1,3", "1,3,2", "1x64x64,1x32x64,1x64x64", "1,2x64x64,3x64x64"])
def test_a_profile_that_falls(text: str) -> None:
    with pytest.raises(UsageError, match="must rise from smallest over usual to largest"):
        parse_profile(text)


@pytest.mark.parametrize(
    ("shape", "text", "words"),
    [
        ((1, 512, 640, 3), "1,1,1", "and nothing else; export it with --dynamic"),
        ((-1, 512, 640, 3), "1x320x256,1x640x512,1x640x512", "where -1 is free, not"),
        ((1, -1, -1, 3), "2x640x512,2x640x512,2x640x512", "where -1 is free, not"),
        ((-1, -1, -1, 3), "1,2,3", "leaves the size free; say batch x width x height"),
    ],
)
def test_a_profile_the_graph_cannot_grant(shape: tuple[int, ...], text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shapes(shape, text)


def test_a_free_size_without_a_largest() -> None:
    with pytest.raises(DataError, match="names no largest size; give --profile"):
        shapes((1, -1, -1, 3), said={})
