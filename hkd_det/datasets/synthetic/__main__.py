"""`python -m hkd_det.datasets.synthetic ROOT`: draw a street, in CityPersons' layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_det.datasets.synthetic.writer import write_synthetic_dataset, write_video
from hkd_det.errors import run_command


def _run_synthetic(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hkd_det.datasets.synthetic", description=__doc__)
    parser.add_argument("root", type=Path, help="the folder to write")
    parser.add_argument("--train", type=int, default=240, help="pictures to train on")
    parser.add_argument("--val", type=int, default=60, help="pictures to validate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip", type=Path, help="also write a film of 100 frames")
    arguments = parser.parse_args(argv)
    write_synthetic_dataset(arguments.root, arguments.train, arguments.val, arguments.seed)
    if arguments.clip:
        write_video(arguments.clip, arguments.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("synthetic", _run_synthetic, None))
