"""`hkd-quickstart`: the complete workflow on the user's images, or on synthetic images of a street.

It checks the data, trains a teacher and a student alone and distilled, exports and measures, and writes a report and a
folder for deployment. This module has the command and needs no torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_det import __version__
from hkd_det.errors import UsageError, require_extra, run_command

DEFAULT_SAVE_DIR = Path("runs/quickstart")
OWN_DATA_FLAGS = ("max_ms", "device_bench", "hours", "threads", "device", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments; those of the process by default.
    """
    return run_command("hkd-quickstart", _run_quickstart_cli, argv)


def _run_quickstart_cli(argv: Sequence[str] | None) -> int:
    flags = _build_quickstart_parser().parse_args(argv)
    return _run_own_data_cli(flags) if flags.data else _run_street_cli(flags)


def _run_street_cli(flags: argparse.Namespace) -> int:
    for name in OWN_DATA_FLAGS:
        value = getattr(flags, name)
        if value is not None and value is not False:  # --max-ms 0 is a value
            raise UsageError(f"--{name.replace('_', '-')}: requires --data. Add --data DATA.")
    with require_extra("train"):
        from hkd_bench.quickstart.steps import QuickstartConfig, run_quickstart  # noqa: PLC0415 - imports torch
        from hkd_bench.table import format_text_table  # noqa: PLC0415 - imports packages of the extra
    save_dir = flags.save_dir or DEFAULT_SAVE_DIR
    config = QuickstartConfig() if flags.epochs is None else QuickstartConfig(epochs=flags.epochs)
    result = run_quickstart(save_dir, flags.seed, config)
    print(f"\n{format_text_table(result)}\n")
    print(f"report: {save_dir / 'report.html'}   video: {save_dir / 'video.mp4'}")
    return 0


def _run_own_data_cli(flags: argparse.Namespace) -> int:
    with require_extra("bench"):
        from hkd_bench.quickstart.plan import OwnDataOptions  # noqa: PLC0415 - imports packages of the extra
        from hkd_det.datasets.catalog import list_splits  # noqa: PLC0415 - imports packages of the extra
        from hkd_det.datasets.check_report import choose_report_dir  # noqa: PLC0415 - imports packages of the extra
    options = OwnDataOptions(
        data=flags.data,
        save_dir=flags.save_dir or choose_report_dir(DEFAULT_SAVE_DIR.parent, flags.data, "quickstart-"),
        seed=flags.seed,
        max_ms=flags.max_ms,
        device_bench=flags.device_bench,
        hours=flags.hours,
        epochs=flags.epochs,
        threads=flags.threads,
        device=flags.device or "auto",
    )
    list_splits(flags.data)  # errors of the flags come before the slow import of torch
    with require_extra("train"):
        from hkd_bench.quickstart.own_data import run_own_data  # noqa: PLC0415 - imports torch
    run_own_data(options, flags.plan)
    return 0


def _build_quickstart_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hkd-quickstart",
        description="Run the complete workflow: check the data, train, distill, export, measure, write a report. With "
        "--data on your images, also a folder for deployment; without, on synthetic images of a street.",
        epilog="example: hkd-quickstart --data mine.yaml --max-ms 15 --hours 2. After an interruption, the same "
        "command continues.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--data", help="your dataset, as for hkd-train --data; training starts from hkd-cpu (default: synthetic images)"
    )
    parser.add_argument(
        "--save-dir",
        type=Path,
        help=f"output directory (default: {DEFAULT_SAVE_DIR}, with --data {DEFAULT_SAVE_DIR}-NAME)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of images and training (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, help="epochs of each training run (default: 12, with --data 10 or those of --hours)"
    )
    group = parser.add_argument_group("budgets, require --data")
    group.add_argument(
        "--max-ms",
        type=float,
        metavar="MS",
        help="maximum median latency from image to boxes in milliseconds; chooses student and input size",
    )
    group.add_argument(
        "--device-bench",
        type=Path,
        metavar="JSON",
        help="times of another device for --max-ms: `hkd-bench SAVE_DIR/candidates/*.onnx --json JSON` there; --plan "
        "writes the candidates (default: measure this device)",
    )
    group.add_argument("--hours", type=float, help="time budget; chooses epochs and teacher (default: no limit)")
    group.add_argument("--threads", type=int, help="CPU threads of measured models (default: one per physical core)")
    group.add_argument("--device", help="device of the training: auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--plan", action="store_true", help="measure for about a minute, print the plan with times, and stop"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
