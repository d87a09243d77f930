"""`hkd-bench score`: miss rate or COCO's AP of detections in files, one table, one plot, one JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hkd_bench.plots import PLOT_SUFFIXES, write_miss_rate_plot
from hkd_bench.scoring import PROTOCOLS, ScoreConfig, ScoreResult, score_files
from hkd_bench.table import format_score_table
from hkd_det.errors import UsageError
from hkd_det.files import write_text


def run_score(argv: Sequence[str] | None) -> int:
    """The command's body; returns its exit code."""
    flags = _parse_score_args(argv or [])
    setups = tuple(name for given in flags.setup for name in given.split(","))
    request = ScoreConfig(flags.annotations, flags.protocol, setups, flags.sets, flags.strict)
    names = _make_score_names(flags)
    scores = []
    for found in tqdm(score_files(request, flags.detections), total=len(names), unit="file", leave=False, delay=1):
        scores.append(found)
        if found.out_of_range_scores:
            told = f"{found.out_of_range_scores} of {found.num_detections} scores lie outside 0 to 1; only their order counts"
            print(f"hkd-bench: warning: {found.detections}: {told}", file=sys.stderr)
    if flags.plot:
        write_miss_rate_plot(flags.plot, dict(zip(names, scores, strict=True)))
    result = json.dumps(_make_json_content(request, names, scores), indent=1, allow_nan=False) + "\n"
    if str(flags.json) == "-":
        print(result, end="")
        return 0
    print(format_score_table(dict(zip(names, scores, strict=True))))
    if flags.json:
        write_text(flags.json, result)
    for path in (flags.json, flags.plot):
        if path:
            print(f"saved {path}")
    return 0


def _make_json_content(config: ScoreConfig, names: Sequence[str], scores: Sequence[ScoreResult]) -> dict[str, Any]:
    """One detection file: its figures at the top. Several: a list of such."""
    about = {"protocol": config.protocol, "annotations": str(config.annotations)}
    if config.zero_recall_before_curve:
        about["points_before_the_curve"] = "strict"
    each = [{"name": name, **_make_metrics(found)} for name, found in zip(names, scores, strict=True)]
    return {**about, **each[0]} if len(each) == 1 else {**about, "results": each}


def _make_metrics(result: ScoreResult) -> dict[str, Any]:
    rates = result.miss_rates
    figures: dict[str, Any] = {"detections": str(result.detections), "count": result.num_detections}
    if rates:
        figures["miss_rate"] = {name: rate.value for name, rate in rates.items()}
        figures["people"] = {name: rate.num_gt for name, rate in rates.items()}
        figures["pictures"] = next(iter(rates.values())).num_images
    return {**figures, **({"coco": result.coco_metrics} if result.coco_metrics else {})}


def _make_score_names(flags: argparse.Namespace) -> list[str]:
    """As given, or the shortest ends of the paths that tell them apart."""
    paths: list[Path] = flags.detections
    if flags.names:
        names = flags.names.split(",")
    else:
        parts = next((n for n in (1, 2, 3) if len({path.parts[-n:] for path in paths}) == len(paths)), 99)
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names: {len(paths)} detection files need as many different names")
    return names


def _parse_score_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-bench score",
        description="The official figures of detections in files, whoever made them.",
        epilog="hkd-bench score --annotations val_gt.json --detections dt.json --protocol citypersons --json -",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        metavar="GT",
        help="citypersons, coco: a COCO JSON. caltech: a folder of set06/V000.vbb. caltech-new: a folder of its text "
        "files. Both: a gt-SETUP.mat",
    )
    parser.add_argument(
        "--detections",
        type=Path,
        required=True,
        nargs="+",
        metavar="DT",
        help="JSON of image_id, category_id, bbox, score; caltech: a folder of set06/V000.txt. Several are compared",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--setup", action="append", default=[], metavar="NAME", help="default: all; may be repeated")
    parser.add_argument("--sets", default="", help="caltech: set06 or set06-set10 (default: the test sets there)")
    parser.add_argument("--names", help="what to call the files, comma-separated")
    parser.add_argument("--strict", action="store_true", help="citypersons: nothing is found before the curve begins")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, fractions unrounded; - for stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="miss rate against FPPI, .svg, .png or .pdf")
    flags = parser.parse_args(argv)
    _check_score_args(flags)
    return flags


def _check_score_args(flags: argparse.Namespace) -> None:
    if flags.plot and flags.plot.suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {flags.plot}: name a file that ends in {', '.join(PLOT_SUFFIXES)}")
    if flags.plot and flags.protocol == "coco":
        raise UsageError("--plot: COCO's measure has no curve of miss rates; take another --protocol")
    if flags.strict and flags.protocol != "citypersons":
        raise UsageError("--strict: only citypersons has two readings; Caltech's is the strict one")
    if flags.sets and not flags.protocol.startswith("caltech"):
        raise UsageError("--sets: only Caltech has sets")
    for flag, path in (("--json", flags.json), ("--plot", flags.plot)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: a folder; name a file in it")
