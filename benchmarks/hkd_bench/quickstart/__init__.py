"""`hkd-quickstart`: the complete workflow on synthetic images.

It generates street images, trains a teacher and a student, and distills a second student. Then it exports and measures
all three, runs the distilled student on a video and writes a report. This module has the command and needs no torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_det import __version__
from hkd_det.errors import require_extra, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments; those of the process by default.
    """
    return run_command("hkd-quickstart", _run_quickstart_cli, argv)


def _run_quickstart_cli(argv: Sequence[str] | None) -> int:
    flags = _build_quickstart_parser().parse_args(argv)
    with require_extra("train"):
        from hkd_bench.quickstart.steps import QuickstartConfig, run_quickstart  # noqa: PLC0415 - imports torch
        from hkd_bench.table import format_text_table  # noqa: PLC0415 - imports packages of the extra
    result = run_quickstart(flags.save_dir, flags.seed, QuickstartConfig(epochs=flags.epochs))
    print(f"\n{format_text_table(result)}\n")
    print(f"report: {flags.save_dir / 'report.html'}   video: {flags.save_dir / 'video.mp4'}")
    return 0


def _build_quickstart_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hkd-quickstart",
        description="Run the complete workflow on synthetic images: train, distill, export, measure, write a report.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--save-dir", type=Path, default=Path("runs/quickstart"), help="output directory (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of images and training (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each training run (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
