"""Extract the images of Caltech Pedestrian from its videos.

ROOT/videos/set06/V000.seq or ROOT/set06/V000.seq becomes ROOT/images/set06/V000/I00029.jpg and so on. Existing
images are kept.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from hkd_det.config import check_range
from hkd_det.console import iterate_with_progress, log_stage
from hkd_det.datasets.caltech import SETS, parse_sets
from hkd_det.datasets.seq import SeqVideo, open_seq
from hkd_det.errors import DataError, run_command
from hkd_det.files import atomic_write


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m hkd_det.datasets.caltech_extract`.

    Args:
        argv: Command-line arguments (default: `sys.argv[1:]`).

    Returns:
        The exit code.
    """
    return run_command("caltech_extract", _run, argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = _build_parser().parse_args(argv)
    check_range("--frame-step", arguments.frame_step, 1)
    sets, image_dir = parse_sets(arguments.sets), arguments.root / "images"
    videos = _list_videos(arguments.root, sets)
    counts = {name: [0, 0, 0] for name in sets}  # videos, written images, existing images
    log_stage(f"extract images of {len(videos)} videos")
    for path in iterate_with_progress(videos, len(videos), "extract images", "video"):
        extracted = extract_frames(path, image_dir / path.parent.name / path.stem, arguments.frame_step)
        counts[path.parent.name] = [a + b for a, b in zip(counts[path.parent.name], (1, *extracted), strict=True)]
    for name, (num_videos, num_written, num_existing) in counts.items():
        print(
            f"{name}: {num_videos} videos, {num_written} images written to {image_dir / name}, {num_existing} existed"
        )
    return 0


def extract_frames(path: Path, folder: Path, frame_step: int) -> tuple[int, int]:
    """Extract every n-th frame of a video.

    Args:
        path: `.seq` video. JPEG frames are copied byte by byte; others are written as PNG.
        folder: Target directory of `I00029.jpg` and so on.
        frame_step: Extract the frames with the indices frame_step - 1, 2 * frame_step - 1 and so on.

    Returns:
        Number of written and of existing images.

    Raises:
        DataError: The video is missing or invalid.
    """
    with open_seq(path) as video:
        indices = range(frame_step - 1, len(video), frame_step)
        suffix = ".jpg" if video.is_jpeg else ".png"
        missing = [(index, target) for index in indices if not (target := folder / f"I{index:05}{suffix}").exists()]
        for index, target in missing:
            encoded = _encode_frame(video, index)
            with atomic_write(target) as temp_path:
                temp_path.write_bytes(encoded)
    return len(missing), len(indices) - len(missing)


def _encode_frame(video: SeqVideo, index: int) -> bytes:
    if video.is_jpeg:
        return video.read_raw(index)
    return cv2.imencode(".png", cv2.cvtColor(video.read_frame(index), cv2.COLOR_RGB2BGR))[1].tobytes()


def _list_videos(root: Path, sets: Sequence[str]) -> list[Path]:
    for folder in (root / "videos", root):
        videos = [path for name in sets for path in sorted((folder / name).glob("V*.seq"))]
        if videos:
            return videos
    raise DataError(f"{root}: contains no videos. Expected videos/{sets[0]}/V*.seq or {sets[0]}/V*.seq.")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hkd_det.datasets.caltech_extract", description=__doc__)
    parser.add_argument("root", type=Path, help="directory that contains videos/set06/V000.seq or set06/V000.seq")
    parser.add_argument(
        "--frame-step",
        type=int,
        default=30,
        help="extract every n-th frame (default: %(default)s, the frames 29, 59, ... of the test protocol)",
    )
    parser.add_argument(
        "--sets", default=f"{SETS[0]}-{SETS[-1]}", help="a set or a range of sets (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
