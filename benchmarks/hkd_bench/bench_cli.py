"""`hkd-bench`: miss rate, latency and memory of exported models in one table."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.report import ExampleImages, render_examples, write_bench_report
from hkd_bench.result import BenchResult, write_result
from hkd_bench.table import format_text_table
from hkd_deploy import open_detector
from hkd_deploy.backends import BACKENDS
from hkd_deploy.streams.sources import list_images
from hkd_det import __version__
from hkd_det.datasets.catalog import SPLITS, load_dataset
from hkd_det.errors import UsageError
from hkd_det.structures import Sample

EXAMPLE_CONF = 0.3  # minimum score of a box in the report; the miss rate itself has no threshold
NUM_EXAMPLES = 6


def run_bench(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments after `hkd-bench`.

    Raises:
        HkdError: A flag, a model or the data set is invalid.
    """
    args = argv or []
    flags = _parse_bench_args(args)
    samples = _load_samples(flags)[: flags.max_images]
    options = BenchOptions(
        device=flags.device,
        threads=flags.threads,
        backends=tuple(flags.backend.split(",")) if flags.backend else (None,),
        runs=flags.runs,
        data=flags.data or str(flags.images),
        split=flags.split if flags.data else "",
        command=shlex.join(["hkd-bench", *args]),
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
    if not flags.images.is_dir():
        raise UsageError(f"--images {flags.images}: no such directory")
    return [Sample(path.name, path) for path in list_images(flags.images)]


def _make_examples(flags: argparse.Namespace, samples: Sequence[Sample]) -> ExampleImages | None:
    """Render example images of the last model; None without ground truth."""
    if not flags.data:
        return None
    backend = flags.backend.split(",")[-1] if flags.backend else None
    with open_detector(flags.models[-1], flags.device, flags.threads, backend) as detector:
        return render_examples(detector, samples, EXAMPLE_CONF, NUM_EXAMPLES)


def _make_title(result: BenchResult) -> str:
    names = [model.name for model in result.models]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{listed} on {Path(result.data).name} {result.split}".rstrip()


def _parse_bench_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-bench",
        description="Measure exported models: miss rate on a data set, latency, memory. "
        "See `hkd-bench score --help` for the metrics of detection files.",
        epilog="example: hkd-bench teacher.onnx student.onnx --data citypersons --split val --html report.html",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="files or directories written by hkd-export"
    )
    parser.add_argument("--data", help="data set: a name in datasets.yaml or a .yaml file")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="directory of images without annotations, instead of --data: no miss rate",
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="split of --data (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument(
        "--backend",
        metavar="A,B",
        help=f"measure every model on each of {', '.join(BACKENDS)} (default: by the type of the model)",
    )
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: one per physical core)")
    parser.add_argument("--runs", type=int, default=200, help="timed runs per model (default: %(default)s)")
    parser.add_argument("--max-images", type=int, metavar="N", help="use only the first N images")
    parser.add_argument("--names", metavar="A,B", help="names of the models (default: the file names)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics and latency samples")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report as one self-contained HTML file")
    flags = parser.parse_args(argv)
    _check_bench_args(flags)
    return flags


def _check_bench_args(flags: argparse.Namespace) -> None:
    """Check flags that would otherwise fail only after the measurement."""
    if bool(flags.data) == bool(flags.images):
        raise UsageError(
            "--data, --images: expected exactly one of them: a data set (--data citypersons) or a directory of images "
            "to time without miss rate (--images DIR)"
        )
    if flags.max_images is not None and flags.max_images < 1:
        raise UsageError(f"--max-images: expected at least 1, got {flags.max_images}")
    for flag, path in (("--json", flags.json), ("--html", flags.html)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: expected a file, got a directory")
