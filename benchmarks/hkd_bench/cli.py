"""`hkd-bench`: miss rate, latency, memory and energy of exported models in one table.

`hkd-bench score` is in `score_cli`, and `hkd-bench compare` in `compare_cli`.

The optional packages are checked before any module that imports them, so that a missing one gives one line of error.
"""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hkd_bench import scenarios
from hkd_deploy import open_detector
from hkd_deploy.backends import BACKENDS
from hkd_deploy.streams.sources import list_images
from hkd_det import __version__
from hkd_det.config import check_range, parse_duration_s
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.data_yaml import SPLITS
from hkd_det.errors import BENCH_INSTALL_HINT, UnavailableError, UsageError, run_command
from hkd_det.shipped import format_model_list, resolve_model
from hkd_det.structures import Sample

if TYPE_CHECKING:
    from hkd_bench.result import ModelResult

# Packages of the extra `bench` that the commands import.
BENCH_PACKAGES = ("jinja2", "matplotlib", "msgspec", "psutil", "pycocotools", "scipy", "simplejpeg", "tabulate", "tqdm")
EXAMPLE_CONF = 0.3  # minimum score of a box in the report; the miss rate itself has no threshold
NUM_EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hkd-bench`, `hkd-bench score` or `hkd-bench compare` and return the exit code.

    Args:
        argv: Arguments after the command name; the default is `sys.argv`.
    """
    return run_command("hkd-bench", _run_subcommand, sys.argv[1:] if argv is None else argv)


def _check_packages(packages: Sequence[str], hint: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package}: not installed. {hint}")


def _run_subcommand(argv: Sequence[str] | None) -> int:
    args = argv or []
    _check_packages(BENCH_PACKAGES, BENCH_INSTALL_HINT)
    if args[:1] == ["score"]:
        from hkd_bench import score_cli  # noqa: PLC0415  # imports packages of the extra

        return score_cli.run_score(args[1:])
    if args[:1] == ["compare"]:
        from hkd_bench import compare_cli  # noqa: PLC0415  # imports packages of the extra

        return compare_cli.run_compare(args[1:])
    return run_bench(args)


def run_bench(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments after `hkd-bench`.

    Raises:
        HkdError: A flag, a model or the dataset is invalid.
    """
    from hkd_bench import bench, detection_files, report, result, separate_tables, sweep, table  # noqa: PLC0415  # import packages of the extra

    args = argv or []
    flags = parse_bench_args(args)
    if flags.list_models:
        print(format_model_list())
        return 0
    imgsz_sweep = sweep.parse_imgsz_sweep(flags.imgsz_sweep) if flags.imgsz_sweep else ()
    sizes = [sweep.list_sweep_sizes(model, imgsz_sweep)[-1] for model in flags.models] if imgsz_sweep else []
    datasets = flags.data.split(",") if flags.data else []
    samples = _load_samples(flags, datasets)[: flags.max_images]
    other_ground_truths = {
        name: result.align_samples(samples, load_dataset(name, flags.split), name) for name in datasets[1:]
    }
    options = bench.BenchOptions(
        device=flags.device,
        threads=flags.threads,
        backends=tuple(flags.backend.split(",")) if flags.backend else (None,),
        runs=flags.runs,
        data=datasets[0] if datasets else str(flags.images),
        split=flags.split if flags.data else "",
        model_configs=parse_model_configs(flags.model_config),
        command=shlex.join(["hkd-bench", *args]),
        has_ground_truth=bool(flags.data),
        save_detections=flags.save_detections,
        differences=flags.differences,
        category_id=detection_files.find_category_id(datasets[0], flags.split) if datasets else None,
        energy=flags.energy or flags.power_csv is not None,
        power_csv=flags.power_csv,
        require_quiet=flags.require_quiet,
        imgsz_sweep=imgsz_sweep,
        cameras_fps=flags.cameras,
        scenarios=flags.scenario,
        scenario_settings=flags.scenario_settings,
        sustained_s=flags.sustained,
        scenario_logs=flags.scenario_logs or (flags.json and flags.json.with_name(f"{flags.json.stem}-loadgen")),
    )
    given_names = flags.names.split(",") if flags.names else None
    measured = bench.bench(flags.models, samples, options, given_names, other_ground_truths)
    print(table.format_text_table(measured))
    if flags.json:
        result.write_result(flags.json, measured)
        print(f"saved {flags.json}")
    if flags.save_detections:
        names = [model.name for model in measured.models]
        for path in detection_files.list_detection_files(flags.save_detections, names):
            print(f"saved {path}")
    if flags.differences:
        print(f"saved {flags.differences / 'index.html'}")
    if flags.html:
        title = _make_title([model.name for model in measured.models], measured.data, measured.split)
        examples = None
        if flags.data:
            last = flags.models[-1]
            model_config = bench.assign_model_configs(flags.models, options.model_configs).get(last)
            imgsz_hw = sizes[-1] if sizes else None
            with open_detector(
                last, flags.device, flags.threads, options.backends[-1], model_config=model_config, imgsz_hw=imgsz_hw
            ) as detector:
                examples = report.render_examples(detector, samples, EXAMPLE_CONF, NUM_EXAMPLES)
        report.write_bench_report(flags.html, measured, title=title, examples=examples)
        print(f"saved {flags.html}")
    if flags.require_quiet:
        check_marks(measured.models)
    invalid = separate_tables.list_invalid_scenarios(measured.models)
    runs = [model.sustained for model in measured.models] if flags.sustained else []
    if any(run is None or run.is_interrupted for run in runs):
        raise KeyboardInterrupt  # all that was measured is saved
    if invalid:
        raise UnavailableError(
            f"--scenario: invalid: {'. '.join(invalid)}. Set a longer --min-duration, more --min-queries or a lower "
            "--target-qps."
        )
    return 0


def parse_model_configs(text: str | None) -> tuple[Path | None, ...]:
    """Parse the value of `--model-config`.

    Args:
        text: YAML files or names, separated by commas; an empty entry selects the default of a model.

    Returns:
        One entry per name; none without the flag.
    """
    return tuple(Path(name.strip()) if name.strip() else None for name in text.split(",")) if text else ()


def check_marks(models: "Sequence[ModelResult]") -> None:
    """Check that the machine was quiet during all runs.

    A throttled or changed clock is what a sustained run measures; there, only other processes are an error.

    Args:
        models: Measurements of all models.

    Raises:
        UnavailableError: A model is marked.
    """
    marks = [f"{model.name}: {mark}" for model in models for mark in model.conditions.marks]
    marks += [
        f"{model.name} {one.scenario}: {mark}" for model in models for one in model.scenarios for mark in one.marks
    ]
    marks += [
        f"{model.name} sustained: {mark}"
        for model in models
        if model.sustained
        for mark in model.sustained.marks
        if not mark.startswith(("throttled", "changed clock"))
    ]
    if marks:
        raise UnavailableError(f"--require-quiet: {'; '.join(marks)}. The results are marked; measure again.")


def _load_samples(flags: argparse.Namespace, datasets: Sequence[str]) -> list[Sample]:
    if datasets:
        return load_dataset(datasets[0], flags.split)
    if not flags.images.is_dir():
        raise UsageError(f"--images {flags.images}: no such directory. Expected a directory of images.")
    return [Sample(path.name, path) for path in list_images(flags.images)]


def _make_title(names: Sequence[str], data: str, split: str) -> str:
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{listed} on {Path(data).name} {split}".rstrip()


def parse_bench_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags of `hkd-bench`.

    Args:
        argv: Arguments after `hkd-bench`.

    Raises:
        UsageError: A value is invalid, or flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog="hkd-bench",
        description="Measure detectors: miss rate on a dataset, latency, memory, energy. "
        "See `hkd-bench score --help` for the metrics of detection files, and `hkd-bench compare --help` for a table "
        "of several JSON results, with conditions for CI.",
        epilog="example: hkd-bench teacher.onnx student.onnx --data citypersons --split val --html report.html",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        metavar="MODEL",
        help="files or directories written by hkd-export, ONNX and OpenVINO files of other tools, or names of shipped "
        "models",
    )
    parser.add_argument("--list-models", action="store_true", help="list the shipped models and exit")
    parser.add_argument(
        "--model-config",
        metavar="YAML[,YAML]",
        help="configuration of the models that hkd-export did not write: one for all, or one per such model, each a "
        "YAML file, a name such as yolox, or empty (default: recognized, or MODEL.yaml next to MODEL.onnx)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA[,DATA]",
        help="dataset: a name in datasets.yaml or a .yaml file; further ones contain other ground truths of the same "
        "images",
    )
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
    parser.add_argument(
        "--imgsz-sweep",
        metavar="START:STOP:STEP",
        help="measure each model at several input sizes: widths in pixels with STOP, multiples of 32; requires models "
        "of hkd-export --dynamic size",
    )
    parser.add_argument(
        "--cameras",
        type=float,
        metavar="FPS",
        help="find the number of cameras at this rate for which the 99th percentile of the time from a frame to its "
        "boxes is below the period 1/FPS",
    )
    parser.add_argument("--runs", type=int, default=200, help="timed runs per model (default: %(default)s)")
    parser.add_argument("--max-images", type=int, metavar="N", help="use only the first N images")
    parser.add_argument(
        "--energy",
        action="store_true",
        help="measure the energy per frame (RAPL, NVML, Jetson power rails): further runs of 10 s per model and round, "
        "and the idle power before and after",
    )
    parser.add_argument(
        "--power-csv",
        type=Path,
        metavar="FILE",
        help="energy by an external meter, whose program writes this file meanwhile: columns time (Unix or ISO 8601) "
        "and watts, or the log of tegrastats; implies --energy",
    )
    parser.add_argument(
        "--require-quiet",
        action="store_true",
        help="fail (exit code 1) if the machine is not quiet: before the measurement for other load and throttling, "
        "after it also for changed clocks",
    )
    _add_scenario_flags(parser)
    parser.add_argument("--names", metavar="A,B", help="names of the models (default: the file names)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics and latency samples")
    parser.add_argument(
        "--save-detections",
        type=Path,
        metavar="FILE",
        help="write the detections in all images as COCO JSON, for `hkd-bench score`; with several models one file "
        "each, FILE-NAME",
    )
    parser.add_argument(
        "--differences",
        type=Path,
        metavar="DIR",
        help="write a page on which the images are browsed where the models differ from the first one: persons that "
        "only one detects, and false positives; requires --data and at least two models",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report as one self-contained HTML file")
    flags = parser.parse_args(argv)
    flags.sustained = parse_duration_s("--sustained", flags.sustained) if flags.sustained else 0.0
    flags.scenario = scenarios.parse_scenarios(flags.scenario) if flags.scenario else ()
    flags.scenario_settings = scenarios.ScenarioSettings(
        flags.target_qps,
        flags.target_latency,
        parse_duration_s("--min-duration", flags.min_duration),
        flags.min_queries,
        flags.scenario_batch,
    )
    if not flags.list_models:
        _check_bench_args(flags)
    flags.models = [resolve_model(model) for model in flags.models]
    return flags


def _add_scenario_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenario",
        metavar="A,B",
        help="measure load scenarios after the other measurements: single-stream, multi-stream, server, offline "
        "(MLPerf LoadGen, requires the extra `loadgen`), paced (frames of one camera); exit code 1 if a result is "
        "invalid",
    )
    parser.add_argument(
        "--target-qps",
        type=float,
        metavar="RATE",
        help="server: queries per second, Poisson-distributed; paced: frames per second",
    )
    parser.add_argument(
        "--target-latency",
        type=float,
        metavar="MS",
        default=scenarios.TARGET_LATENCY_MS,
        help="server: limit of the 99th percentile in ms (default: %(default)s); that of paced is the period",
    )
    parser.add_argument(
        "--min-duration",
        metavar="TIME",
        default=f"{scenarios.MIN_DURATION_S:g}s",
        help="minimum duration of each scenario, such as 60s or 10m (default: %(default)s)",
    )
    parser.add_argument(
        "--min-queries",
        type=int,
        metavar="N",
        help="minimum number of queries of each scenario, of offline that of images (default: what the early-stopping "
        "rule needs: 64 for single-stream, 662 for multi-stream, server and paced; 1 for offline)",
    )
    parser.add_argument(
        "--scenario-batch",
        type=int,
        metavar="N",
        default=1,
        help="largest number of images in one call for offline and server, with a file whose batch is free (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--scenario-logs",
        type=Path,
        metavar="DIR",
        help="directory for LoadGen's logs, DIR/MODEL/SCENARIO/mlperf_log_*.txt (default: JSON-loadgen next to --json)",
    )

    parser.add_argument(
        "--sustained",
        metavar="TIME",
        help="run each model without pauses after the other measurements, such as 30m or 90s: latency, clocks, "
        "temperature and power over time; Ctrl-C ends it and keeps what was measured",
    )


def _check_bench_args(flags: argparse.Namespace) -> None:
    """Check flags that would otherwise fail only after the measurement."""
    if not flags.models:
        raise UsageError("MODEL: expected at least one model. Give a file, or a name of `hkd-bench --list-models`.")
    if bool(flags.data) == bool(flags.images):
        raise UsageError(
            "--data, --images: expected exactly one of them: a dataset (--data citypersons) or a directory of images "
            "to time without miss rate (--images DIR)."
        )
    if flags.cameras is not None:
        check_range("--cameras", flags.cameras, 0.1, 1000)
    if flags.max_images is not None:
        check_range("--max-images", flags.max_images, 1)
    scenarios.check_scenarios(flags.scenario, flags.scenario_settings)
    if flags.power_csv and not flags.power_csv.is_file():
        raise UsageError(f"--power-csv {flags.power_csv}: no such file. Start the meter's program first.")
    for flag, path in (
        ("--json", flags.json),
        ("--html", flags.html),
        ("--save-detections", flags.save_detections),
    ):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: expected a file, got a directory.")
    if flags.differences and flags.differences.is_file():
        raise UsageError(f"--differences {flags.differences}: expected a directory, got a file.")
