"""How many of each Caltech test video's frames are measured: every 30th, 4,024 in all.

For files that hold the truth of all these frames and do not say which is which: the official programs' gt-SETUP.mat.
Counted in the list of test pictures (set06_V000_I00029.jpg, ...) that detectors for the new annotations bring along.
"""

NUM_TEST_FRAMES = {
    "set06": (61, 61, 59, 59, *[61] * 15),
    "set07": (61, 61, 61, 61, 65, 72, 61, 61, 61, 61, 61, 60),
    "set08": (59, 59, 61, 61, 61, 61, 61, 61, 61, 56, 56),
    "set09": (62, 62, 61, 61, 59, 66, 61, 61, 61, 61, 61, 62),
    "set10": (*[61] * 11, 57),
}


def test_frame_ids() -> dict[str, int]:
    """Frames measured of each video, `set06/V000` and so on, in order."""
    return {
        f"{name}/V{number:03}": count for name, counts in NUM_TEST_FRAMES.items() for number, count in enumerate(counts)
    }
