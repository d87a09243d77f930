"""`python -m hkd_det.datasets.synthetic ROOT`: write a synthetic data set in the CityPersons layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_det.datasets.synthetic.writer import write_synthetic_dataset, write_video
from hkd_det.errors import run_command


def _run_synthetic(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hkd_det.datasets.synthetic", description="Write a synthetic data set."
    )
    parser.add_argument("root", type=Path, help="output directory")
    parser.add_argument("--train", type=int, default=240, help="number of training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=60, help="number of validation images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: %(default)s)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="also write a video of 100 frames")
    flags = parser.parse_args(argv)
    write_synthetic_dataset(flags.root, flags.train, flags.val, flags.seed)
    if flags.video:
        write_video(flags.video, flags.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("synthetic", _run_synthetic, None))
