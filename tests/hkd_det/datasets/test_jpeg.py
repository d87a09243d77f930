"""JPEG headers: sizes against what decodes, also of damaged files."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.image import is_truncated_jpeg, parse_jpeg_size_hw


def encoded(size_hw: tuple[int, int], *options: int) -> bytes:
    picture = np.random.default_rng(0).integers(0, 255, (*size_hw, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", picture, options)[1].tobytes()


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 300)] * 2), st.booleans(), st.integers(0, 20))
def test_the_size_is_that_of_the_decoded_picture(size_hw: tuple[int, int], progressive: bool, restart: int) -> None:
    raw = encoded(size_hw, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, restart)
    assert parse_jpeg_size_hw(raw) == size_hw
    thumbnail = encoded((8, 9))
    segment = b"\xff\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    assert parse_jpeg_size_hw(raw[:2] + segment + raw[2:]) == size_hw


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG" + encoded((4, 4)), b"text"])
def test_what_has_no_header_has_no_size(raw: bytes) -> None:
    assert parse_jpeg_size_hw(raw) is None


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.integers(0, 700).map(lambda length: encoded((9, 12))[:length]))
def test_any_bytes_have_a_size_or_none(rest: bytes) -> None:
    size_hw = parse_jpeg_size_hw(rest if rest.startswith(b"\xff\xd8") else b"\xff\xd8" + rest)
    assert size_hw is None or min(size_hw) > 0


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1)])
def test_a_size_that_the_bytes_cannot_fill_is_a_false_one(options: tuple[int, ...]) -> None:
    """OpenCV would fill what is missing with 3 GB of grey; a plain picture, which packs best, is let through."""
    raw = cv2.imencode(".jpg", np.zeros((2048, 2048), np.uint8), options)[1].tobytes()
    assert not is_truncated_jpeg(raw)
    size = (2048).to_bytes(2, "big") * 2
    assert raw.count(size) == 1 and is_truncated_jpeg(raw.replace(size, (32000).to_bytes(2, "big") * 2))
