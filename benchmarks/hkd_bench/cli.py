"""`hkd-bench`: miss rate, latency and memory of exported models, side by side."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.report import ExampleImages, render_examples, write_bench_report
from hkd_bench.result import BenchResult, write_result
from hkd_bench.score_cli import run_score
from hkd_bench.table import format_text_table
from hkd_deploy import open_detector
from hkd_deploy.backends import BACKENDS
from hkd_deploy.streams.files import list_images
from hkd_det.datasets.catalog import SPLITS, load_dataset
from hkd_det.errors import UsageError, run_command
from hkd_det.structures import Sample

EXAMPLE_CONF = 0.3  # from which a box is drawn on the page; the miss rate itself has no threshold


EXAMPLE_COUNT = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    typed = sys.argv[1:] if argv is None else argv
    if typed[:1] == ["score"]:
        return run_command("hkd-bench", run_score, typed[1:])
    return run_command("hkd-bench", _run_bench_cli, typed)


def _run_bench_cli(argv: Sequence[str] | None) -> int:
    typed = argv or []
    flags = _parse_bench_args(typed)
    samples = _load_samples(flags)[: flags.limit]
    options = BenchOptions(
        device=flags.device,
        threads=flags.threads,
        backends=tuple(flags.backend.split(",")) if flags.backend else (None,),
        runs=flags.runs,
        data=flags.data or str(flags.pictures),
        split=flags.split if flags.data else "",
        command=shlex.join(["hkd-bench", *typed]),
        has_ground_truth=bool(flags.data),
    )
    result = bench(flags.models, samples, options, names=flags.names.split(",") if flags.names else None)
    print(format_text_table(result))
    if flags.json:
        write_result(flags.json, result)
        print(f"saved {flags.json}")
    if flags.html:
        write_bench_report(flags.html, result, title=_make_title(result), examples=_make_examples(flags, samples))
        print(f"saved {flags.html}")
    return 0


def _load_samples(flags: argparse.Namespace) -> list[Sample]:
    if flags.data:
        return load_dataset(flags.data, flags.split)
    if not flags.pictures.is_dir():
        raise UsageError(f"--pictures {flags.pictures}: no such folder")
    return [Sample(path.name, path) for path in list_images(flags.pictures)]


def _make_examples(flags: argparse.Namespace, samples: Sequence[Sample]) -> ExampleImages | None:
    """Of the last model; None where no truth is known that could judge it."""
    if not flags.data:
        return None
    last = flags.backend.split(",")[-1] if flags.backend else None
    with open_detector(flags.models[-1], flags.device, flags.threads, last) as detector:
        return render_examples(detector, samples, EXAMPLE_CONF, EXAMPLE_COUNT)


def _make_title(result: BenchResult) -> str:
    names = [model.name for model in result.models]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{listed} on {Path(result.data).name} {result.split}".rstrip()


def _parse_bench_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-bench",
        description="Measure exported models side by side: miss rate on a data set, latency, memory, this machine. "
        "`hkd-bench score --help`: the miss rate of detections that lie in files.",
        epilog="example: hkd-bench teacher.onnx student.onnx --data citypersons --split val --html report.html",
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="files or folders written by hkd-export")
    parser.add_argument("--data", help="a name in datasets.yaml, or your own data .yaml")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="instead of --data: time these, without miss rate")
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument(
        "--backend",
        metavar="A,B",
        help=f"measure every model on each of {', '.join(BACKENDS)} (default: the one of its kind of file)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a physical core)")
    parser.add_argument("--runs", type=int, default=200, help="timed runs a model (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of the split")
    parser.add_argument("--names", metavar="A,B", help="names for the tables (default: the file names)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and sample")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report, one self-contained page")
    flags = parser.parse_args(argv)
    _check_bench_args(flags)
    return flags


def _check_bench_args(flags: argparse.Namespace) -> None:
    """What would otherwise show only after minutes of measuring, too."""
    if bool(flags.data) == bool(flags.pictures):
        raise UsageError(
            "which pictures? either --data, a name in datasets.yaml (--data citypersons) or a path to a .yaml, "
            "or --pictures, a folder of your own to time without miss rate"
        )
    if flags.limit is not None and flags.limit < 1:
        raise UsageError(f"--limit {flags.limit}: at least 1")
    for flag, path in (("--json", flags.json), ("--html", flags.html)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: a folder; name a file in it")
