"""`hkd-bench`: miss rate, latency and memory of exported models, side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.gallery import judged_pictures
from hkd_bench.report import write_report
from hkd_bench.result import write_result
from hkd_bench.table import text_table
from hkd_deploy import open_detector
from hkd_det.datasets.catalogue import SPLITS, open_data
from hkd_det.errors import UsageError, run_command

GALLERY_CONF = 0.3  # from which a box is drawn on the page; the miss rate itself has no threshold
GALLERY_PICTURES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("hkd-bench", _body, argv)


def _body(argv: Sequence[str] | None) -> int:
    flags = _parse(argv)
    samples = open_data(flags.data, flags.split)[: flags.limit]
    options = BenchOptions(flags.device, flags.threads, flags.runs, data=flags.data, split=flags.split)
    result = bench(flags.models, samples, options, names=flags.names.split(",") if flags.names else None)
    print(text_table(result))
    if flags.json:
        write_result(flags.json, result)
        print(f"saved {flags.json}")
    if flags.html:
        with open_detector(flags.models[-1], flags.device, flags.threads) as detector:
            pictures = judged_pictures(detector, samples, GALLERY_CONF, GALLERY_PICTURES)
        title = " and ".join(model.name for model in result.models) + f" on {flags.data} {flags.split}"
        write_report(flags.html, result, title=title, pictures=pictures, commands=[result.command])
        print(f"saved {flags.html}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-bench",
        description="Measure exported models side by side: miss rate on a data set, latency, memory, this machine.",
        epilog="example: hkd-bench teacher.onnx student.onnx --data citypersons --split val --html report.html",
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help=".onnx files written by hkd-export")
    parser.add_argument("--data", help="a name in datasets.yaml, or your own data .yaml")
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a physical core)")
    parser.add_argument("--runs", type=int, default=200, help="timed runs a model (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of the split")
    parser.add_argument("--names", metavar="A,B", help="names for the tables (default: the file names)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and sample")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report, one self-contained page")
    flags = parser.parse_args(argv)
    if not flags.data:
        raise UsageError("--data: which pictures? a name in datasets.yaml (--data citypersons) or a path to a .yaml")
    if flags.limit is not None and flags.limit < 1:
        raise UsageError(f"--limit {flags.limit}: at least 1")
    return flags
