"""`hkd-bench score`: miss rate or COCO's metrics of detection files as a table, a plot and JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hkd_bench.plots import PLOT_SUFFIXES, write_miss_rate_plot
from hkd_bench.scoring import PROTOCOLS, ScoreConfig, ScoreTable, compare_scores, score_files
from hkd_bench.table import format_score_table
from hkd_det.config import check_range
from hkd_det.console import iterate_with_progress, log_stage
from hkd_det.errors import UsageError
from hkd_det.files import write_text
from hkd_det.metrics.bootstrap import NUM_RESAMPLES


def run_score(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments after `hkd-bench score`.

    Raises:
        HkdError: A flag or a file is invalid.
    """
    flags = _parse_score_args(argv or [])
    names = _make_score_names(flags)
    with redirect_stdout(sys.stderr if str(flags.json) == "-" else sys.stdout):  # progress
        tables = [_score_ground_truth(flags, path, names) for path in flags.annotations]
    if flags.plot:
        write_miss_rate_plot(flags.plot, tables[0].scores)
    text = json.dumps(_make_json_content(tables), indent=1, allow_nan=False) + "\n"
    if str(flags.json) == "-":
        print(text, end="")
        return 0
    for table in tables:
        if len(tables) > 1:
            print(f"Ground truth {table.config.annotations}:\n")
        print(format_score_table(table), end="\n\n" if table is not tables[-1] else "\n")
    if flags.json:
        write_text(flags.json, text)
    for path in (flags.json, flags.plot):
        if path:
            print(f"saved {path}")
    return 0


def _score_ground_truth(flags: argparse.Namespace, annotations: Path, names: Sequence[str]) -> ScoreTable:
    config = ScoreConfig(
        annotations=annotations,
        protocol=flags.protocol,
        setups=tuple(name for names in flags.setup for name in names.split(",")),
        caltech_sets=flags.caltech_sets,
        zero_recall_before_curve=flags.zero_recall_before_curve,
        category=tuple(flags.category),
    )
    scores = {}
    log_stage(f"score {len(names)} detection file{'s'[: len(names) > 1]} with {annotations}")
    results = iterate_with_progress(score_files(config, flags.detections), len(names), "score", "file", delay_s=1)
    for name, result in zip(names, results, strict=True):
        scores[name] = result
        if not result.num_detections:
            print(f"hkd-bench: warning: {result.detections}: contains no detection. Check the file.", file=sys.stderr)
        if result.num_out_of_range:
            print(
                f"hkd-bench: warning: {result.detections}: {result.num_out_of_range} of {result.num_detections} scores "
                "are outside 0 to 1. Only their order matters.",
                file=sys.stderr,
            )
        if result.hint:
            print(f"hkd-bench: warning: {result.detections}: {result.hint}", file=sys.stderr)
    return compare_scores(config, scores, flags.bootstrap)


def _make_json_content(tables: Sequence[ScoreTable]) -> dict[str, Any]:
    """Build the JSON content: one object for one ground truth, else a list `ground_truths` of such objects."""
    contents = [_make_ground_truth_content(table) for table in tables]
    return contents[0] if len(contents) == 1 else {"ground_truths": contents}


def _make_ground_truth_content(table: ScoreTable) -> dict[str, Any]:
    """Build one object for one detection file, else an object with a list `results`."""
    header: dict[str, Any] = {"protocol": table.config.protocol, "annotations": str(table.config.annotations)}
    if table.config.category:
        header["category"] = list(table.config.category)
    if table.config.zero_recall_before_curve:
        header["zero_recall_before_curve"] = True
    results = [{"name": name, **_make_metrics(name, table)} for name in table.scores]
    return {**header, **results[0]} if len(results) == 1 else {**header, "results": results}


def _make_metrics(name: str, table: ScoreTable) -> dict[str, Any]:
    result = table.scores[name]
    content: dict[str, Any] = {"detections": str(result.detections), "num_detections": result.num_detections}
    if result.miss_rates:
        content["miss_rate"] = {name: rate.value for name, rate in result.miss_rates.items()}
        content["num_gt"] = {name: rate.num_gt for name, rate in result.miss_rates.items()}
        content["num_images"] = next(iter(result.miss_rates.values())).num_images
        intervals, differences = table.intervals.get(name, {}), table.differences.get(name, {})
        content["interval"] = {setup: [value.ci_low, value.ci_high] for setup, value in intervals.items()}
        if name in table.differences:
            content["difference_to"] = next(iter(table.scores))
            content["difference"] = {setup: asdict(difference) for setup, difference in differences.items()}
    if result.metrics:
        content["metrics"] = result.metrics
    if result.hint:
        content["hint"] = result.hint
    return content


def _make_score_names(flags: argparse.Namespace) -> list[str]:
    """Return the given names, or the shortest path endings that are unique."""
    paths: list[Path] = flags.detections
    if flags.names:
        names = flags.names.split(",")
    else:
        num_parts = next((n for n in (1, 2, 3) if len({path.parts[-n:] for path in paths}) == len(paths)), 99)
        names = ["/".join(path.with_suffix("").parts[-num_parts:]) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names: expected {len(paths)} unique names, one per file, got {', '.join(names)}.")
    return names


def _parse_score_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-bench score",
        description="Compute the official metrics of detection files of any detector.",
        epilog="example: hkd-bench score --annotations gt.json --detections dt.json --protocol citypersons --json -",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        nargs="+",
        metavar="GT",
        help="one or more ground truths of the same images; citypersons, coco: a COCO JSON; caltech: a directory with "
        "set06/V000.vbb; caltech-new: a directory with text files; both: a gt-SETUP.mat",
    )
    parser.add_argument(
        "--detections",
        type=Path,
        required=True,
        nargs="+",
        metavar="DT",
        help="one or more JSON files with image_id, category_id, bbox, score; caltech: directories with set06/V000.txt",
    )
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), required=True, help="evaluation protocol")
    parser.add_argument(
        "--setup", action="append", default=[], metavar="NAME", help="setup to evaluate; may be repeated (default: all)"
    )
    parser.add_argument(
        "--category",
        action="append",
        default=[],
        metavar="NAME",
        help="category to evaluate; may be repeated (default: the person class); citypersons and coco only",
    )
    parser.add_argument(
        "--caltech-sets", default="", metavar="SETS", help="set06 or set06-set10 (default: the test sets); caltech only"
    )
    parser.add_argument("--names", metavar="A,B", help="names of the detection files (default: the file names)")
    parser.add_argument(
        "--zero-recall-before-curve",
        action="store_true",
        help="use recall 0 at FPPI points before the curve; citypersons only",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=NUM_RESAMPLES,
        metavar="N",
        help="resamples of the images for the 95 %% intervals and the differences to the first file; 0 turns them off; "
        "not with coco (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the metrics as unrounded fractions; - prints them"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot miss rate against FPPI (.svg, .png or .pdf); not with coco"
    )
    flags = parser.parse_args(argv)
    _check_score_args(flags)
    return flags


def _check_score_args(flags: argparse.Namespace) -> None:
    if flags.plot and flags.plot.suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {flags.plot}: expected a file name that ends in {', '.join(PLOT_SUFFIXES)}.")
    if flags.plot and flags.protocol == "coco":
        raise UsageError("--plot: the protocol coco has no miss-rate curve. Select another --protocol.")
    if flags.plot and len(flags.annotations) > 1:
        raise UsageError("--plot: requires one ground truth in --annotations.")
    check_range("--bootstrap", flags.bootstrap, 0)
    if flags.zero_recall_before_curve and flags.protocol != "citypersons":
        raise UsageError("--zero-recall-before-curve: requires --protocol citypersons. Caltech always uses recall 0.")
    if flags.category and flags.protocol.startswith("caltech"):
        raise UsageError("--category: requires --protocol citypersons or coco.")
    if flags.caltech_sets and not flags.protocol.startswith("caltech"):
        raise UsageError("--caltech-sets: requires --protocol caltech or caltech-new.")
    for flag, path in (("--json", flags.json), ("--plot", flags.plot)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: expected a file, got a directory.")
