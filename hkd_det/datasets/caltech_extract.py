"""`python -m hkd_det.datasets.caltech_extract ROOT`: Caltech's pictures out of its films.

ROOT/videos/set06/V000.seq, or ROOT/set06/V000.seq, gives ROOT/images/set06/V000/I00029.jpg. A picture that is there
already is not written again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
from tqdm import tqdm

from hkd_det.datasets.caltech import SETS, parse_sets
from hkd_det.datasets.seq import SeqVideo, open_seq
from hkd_det.errors import DataError, UsageError, run_command
from hkd_det.files import atomic_write


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("caltech_extract", _run, argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = _build_parser().parse_args(argv)
    if arguments.frame_step < 1:
        raise UsageError(f"--frame-step {arguments.frame_step} must be 1 or more")
    sets, target = parse_sets(arguments.sets), arguments.root / "images"
    films = _list_videos(arguments.root, sets)
    counts = {name: [0, 0, 0] for name in sets}  # films, pictures written, pictures that were there
    for path in tqdm(films, desc="take pictures", unit="film"):
        done = extract_frames(path, target / path.parent.name / path.stem, arguments.frame_step)
        counts[path.parent.name] = [a + b for a, b in zip(counts[path.parent.name], (1, *done), strict=True)]
    for name, (number, written, there) in counts.items():
        print(f"{name}: {number} films, {written} pictures written to {target / name}, {there} were there")
    return 0


def extract_frames(path: Path, folder: Path, frame_step: int) -> tuple[int, int]:
    """Every so many frames of a film as pictures, I00029 and so on; how many were written, and were there already.

    A JPEG film's pictures are its own, byte for byte; of others they are PNG files.
    """
    with open_seq(path) as film:
        indices = range(frame_step - 1, len(film), frame_step)
        suffix = ".jpg" if film.is_jpeg else ".png"
        missing = [(index, target) for index in indices if not (target := folder / f"I{index:05}{suffix}").exists()]
        for index, target in missing:
            content = _encode_frame(film, index)
            with atomic_write(target) as aside:
                aside.write_bytes(content)
    return len(missing), len(indices) - len(missing)


def _encode_frame(video: SeqVideo, index: int) -> bytes:
    if video.is_jpeg:
        return video.read_raw(index)
    return cv2.imencode(".png", cv2.cvtColor(video.read_frame(index), cv2.COLOR_RGB2BGR))[1].tobytes()


def _list_videos(root: Path, sets: Sequence[str]) -> list[Path]:
    for folder in (root / "videos", root):
        films = [path for name in sets for path in sorted((folder / name).glob("V*.seq"))]
        if films:
            return films
    raise DataError(f"{root}: no films videos/{sets[0]}/V*.seq or {sets[0]}/V*.seq")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hkd_det.datasets.caltech_extract", description=__doc__)
    parser.add_argument("root", type=Path, help="folder that holds videos/set06/V000.seq or set06/V000.seq")
    parser.add_argument("--frame-step", type=int, default=30, help="30: frames 29, 59, ... as the test uses (default)")
    parser.add_argument("--sets", default=f"{SETS[0]}-{SETS[-1]}", help="such as set06, or set00-set05 (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
