"""PNG files that are not all there are told before they are decoded."""

import cv2
import numpy as np

from hkd_det.image import is_truncated_png

RAW = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8))[1].tobytes()


def test_only_a_whole_file_is_whole() -> None:
    assert not is_truncated_png(RAW) and not is_truncated_png(RAW + b"and more")
    assert all(is_truncated_png(RAW[:length]) for length in range(8, len(RAW)))
    assert not is_truncated_png(b"") and not is_truncated_png(b"\xff\xd8 is no PNG")


def test_a_chunk_that_claims_more_than_there_is() -> None:
    """OpenCV would take 2 GiB and half a minute to find out."""
    at = RAW.index(b"IDAT") - 4
    assert is_truncated_png(RAW[:at] + bytes.fromhex("7fffff7f") + RAW[at + 4 :])
