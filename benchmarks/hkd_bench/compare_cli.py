"""`hkd-bench compare`: results of several devices or versions in one table and plot, and conditions for CI."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from hkd_bench import plots
from hkd_bench.detection_files import find_category_id, read_detections
from hkd_bench.differences import ComparedModel, write_difference_pages
from hkd_bench.result import BenchResult, ModelResult, read_result
from hkd_bench.table import format_data_name, format_interval
from hkd_bench.table_notes import MARK, format_model_name
from hkd_det.console import format_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, UsageError
from hkd_det.files import write_text
from hkd_det.metrics.bootstrap import MIN_IMAGES, MIN_PERSONS
from hkd_det.metrics.citypersons import REASONABLE

TEMPLATE = Path(__file__).with_name("compare.html.j2")
CONDITION = re.compile(
    r"(?P<metric>\w+)\s*(?P<operator>[<>]=?)\s*(?P<sign>[+-]?)(?P<number>\d+(\.\d+)?)(?P<percent>%?)"
)


@dataclass(frozen=True)
class CompareMetric:
    """A metric of conditions.

    Attributes:
        unit: Unit of the value.
        difference_unit: Unit of a difference.
        read: Function that returns the value of a model, or None if it was not measured.
        is_accuracy: Whether the value depends on the images.
    """

    unit: str
    difference_unit: str
    read: Callable[[ModelResult], float | None]
    is_accuracy: bool = False


def _to_percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _to_milli(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


METRICS = {
    "mr": CompareMetric(" %", " points", lambda model: _to_percent(model.miss_rates[REASONABLE.name]), True),
    "mr_all": CompareMetric(" %", " points", lambda model: _to_percent(model.miss_rates["All"]), True),
    "ap50": CompareMetric(" %", " points", lambda model: _to_percent(model.accuracy[0].ap50), True),
    "ap": CompareMetric(" %", " points", lambda model: _to_percent(model.accuracy[0].ap), True),
    "recall": CompareMetric(" %", " points", lambda model: _to_percent(model.accuracy[0].recall), True),
    "p50_ms": CompareMetric(" ms", " ms", lambda model: model.latency.p50_ms),
    "p90_ms": CompareMetric(" ms", " ms", lambda model: model.latency.p90_ms),
    "p99_ms": CompareMetric(" ms", " ms", lambda model: model.latency.p99_ms),
    "mean_ms": CompareMetric(" ms", " ms", lambda model: model.latency.mean_ms),
    "memory_mib": CompareMetric(" MiB", " MiB", lambda model: model.peak_memory_mib),
    "build_memory_mib": CompareMetric(" MiB", " MiB", lambda model: model.build_memory_mib),
    "gpu_memory_mib": CompareMetric(" MiB", " MiB", lambda model: model.gpu_memory_mib),
    "energy_mj": CompareMetric(" mJ", " mJ", lambda model: _to_milli(model.energy.joules_per_frame)),
    "above_idle_mj": CompareMetric(" mJ", " mJ", lambda model: _to_milli(model.energy.above_idle)),
    "sustained_p50_ms": CompareMetric(
        " ms", " ms", lambda model: model.sustained.last.p50_ms if model.sustained else None
    ),
    "sustained_p99_ms": CompareMetric(
        " ms", " ms", lambda model: model.sustained.last.p99_ms if model.sustained else None
    ),
    "cameras": CompareMetric("", "", lambda model: model.cameras.cameras if model.cameras else None),
    "file_mib": CompareMetric(" MiB", " MiB", lambda model: model.file_mib),
}
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
}


@dataclass(frozen=True)
class FailCondition:
    """A condition under which the command fails.

    Attributes:
        text: The condition as given.
        metric: Key of `METRICS`.
        operator: Key of `OPERATORS`.
        limit: Limit of the value, or of the change to the first result.
        is_change: Whether the change to the first result is compared.
        is_ratio: Whether the change is in percent of the first value.
    """

    text: str
    metric: str
    operator: str
    limit: float
    is_change: bool
    is_ratio: bool


@dataclass(frozen=True, eq=False)
class NamedResult:
    """A result with the name of its file or device.

    Attributes:
        name: Name for the table and the plot.
        path: JSON file.
        result: Its content.
    """

    name: str
    path: Path
    result: BenchResult


def run_compare(argv: Sequence[str]) -> int:
    """Run `hkd-bench compare`.

    Args:
        argv: Arguments after `compare`.

    Returns:
        Exit code: 0, or 1 if a condition of `--fail-if` is met or cannot be checked.

    Raises:
        UsageError: A flag is invalid, or a file or model does not fit the conditions.
    """
    flags = parse_compare_args(argv)
    results = read_results(flags.results, flags.names.split(",") if flags.names else None)
    conditions = [parse_condition(text) for text in flags.fail_if]
    checks = [check for condition in conditions for check in check_condition(condition, results)]
    print("\n".join([format_compare_table(results), "", *make_compare_notes(results)]))
    for is_failed, line in checks:
        print(f"{'FAILED' if is_failed else 'ok'}: {line}")
    series = {named.name: list(named.result.models) for named in results}
    if flags.plot:
        plots.write_pareto_plot(flags.plot, series)
        print(f"saved {flags.plot}")
    if flags.html:
        write_compare_page(flags.html, results, checks)
        print(f"saved {flags.html}")
    if flags.differences:
        files = [Path(name) for name in flags.detections.split(",")]
        _write_differences(flags.differences, flags.data, files, results)
        print(f"saved {flags.differences / 'index.html'}")
    return int(any(is_failed for is_failed, _ in checks))


def parse_compare_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags of `hkd-bench compare`.

    Args:
        argv: Arguments after `compare`.

    Raises:
        UsageError: A value is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="hkd-bench compare",
        description="Compare JSON results of hkd-bench: one table, one plot, and conditions for CI. The first result "
        "is the reference. Exit code: 0, 1 if a condition is met or cannot be checked, 2 for a usage error.",
        epilog="example: hkd-bench compare main.json branch.json --fail-if 'mr>+0.5' --fail-if 'p99_ms>+10%%'",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="JSON files of `hkd-bench --json`")
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="fail if a model of a further result meets it: METRIC>+X (change to the model of the same name in the "
        "first result; percentage points for rates), METRIC>+X%% (relative change), or METRIC>X (value; also for the "
        f"first result); with > >= < <=; METRIC is one of {', '.join(METRICS)}; can be repeated",
    )
    parser.add_argument(
        "--names", metavar="A,B", help="names of the results, such as devices (default: the file names)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot of miss rate against latency, memory and, where measured, energy (.svg, .png, .pdf)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write table, plot and conditions as one HTML file")
    parser.add_argument(
        "--differences",
        type=Path,
        metavar="DIR",
        help="write a page on which the images are browsed where the models differ from the first one; requires --data "
        "and --detections",
    )
    parser.add_argument("--data", metavar="DATA", help="dataset of the results, for --differences")
    parser.add_argument(
        "--detections",
        metavar="A,B",
        help="files of `hkd-bench --save-detections`, for --differences: one per model of all results, in their order",
    )
    flags = parser.parse_args(argv)
    if bool(flags.differences) != bool(flags.data) or bool(flags.differences) != bool(flags.detections):
        raise UsageError("--differences, --data, --detections: expected all of them or none.")
    if flags.differences and flags.differences.is_file():
        raise UsageError(f"--differences {flags.differences}: expected a directory, got a file.")
    if flags.plot and flags.plot.suffix not in plots.PLOT_SUFFIXES:
        raise UsageError(f"--plot {flags.plot}: expected a name ending in {', '.join(plots.PLOT_SUFFIXES)}.")
    for flag, path in (("--plot", flags.plot), ("--html", flags.html)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: expected a file, got a directory.")
    return flags


def read_results(paths: Sequence[Path], names: Sequence[str] | None) -> list[NamedResult]:
    """Read results.

    Args:
        paths: JSON files, at least one.
        names: One name per file. The default is the file name, or the path if file names repeat.

    Raises:
        UsageError: The names do not fit; a file is missing, invalid, or of another version of the schema.
    """
    if names is None:
        stems = [path.stem for path in paths]
        names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names: expected {len(paths)} different names, one per result, got {','.join(names)}.")
    try:
        return [NamedResult(name, path, read_result(path)) for name, path in zip(names, paths, strict=True)]
    except DataError as error:  # exit code 2: a code of 1 means that a condition is met
        raise UsageError(str(error)) from None


def parse_condition(text: str) -> FailCondition:
    """Parse a condition of `--fail-if`.

    Args:
        text: For example "mr>+0.5", "p99_ms>+10%" or "memory_mib>200".

    Raises:
        UsageError: The text is not a condition.
    """
    match = CONDITION.fullmatch(text.strip())
    if match is None or match["metric"] not in METRICS or (match["percent"] and not match["sign"]):
        raise UsageError(
            f"--fail-if {text}: expected METRIC>+X, METRIC>+X% or METRIC>X, with METRIC one of {', '.join(METRICS)}."
        )
    limit = float(match["sign"] + match["number"])
    return FailCondition(text, match["metric"], match["operator"], limit, bool(match["sign"]), bool(match["percent"]))


def check_condition(condition: FailCondition, results: Sequence[NamedResult]) -> list[tuple[bool, str]]:
    """Check a condition for each model of the further results, or of all results if it limits a value.

    Args:
        condition: The condition.
        results: The results; the first one is the reference.

    Returns:
        Whether the condition is met or cannot be checked, and a line that states the values.

    Raises:
        UsageError: A model or the images of a result are not those of the first one.
    """
    if not condition.is_change:
        return [_check_value(condition, named, model) for named in results for model in named.result.models]
    if len(results) == 1:
        raise UsageError(f"--fail-if {condition.text}: a change requires at least two results. Add another JSON file.")
    return [
        _check_change(condition, results[0], named, model) for named in results[1:] for model in named.result.models
    ]


def _check_value(condition: FailCondition, named: NamedResult, model: ModelResult) -> tuple[bool, str]:
    metric, subject = METRICS[condition.metric], f"{condition.text}: {model.name} ({named.name})"
    value = metric.read(model)
    if reason := _find_obstacle(condition, named, value):
        return True, f"{subject}: not checked: {reason}"
    assert value is not None
    return OPERATORS[condition.operator](value, condition.limit), f"{subject}: {_format_value(condition, model, value)}"


def _check_change(
    condition: FailCondition, reference: NamedResult, named: NamedResult, model: ModelResult
) -> tuple[bool, str]:
    metric, subject = METRICS[condition.metric], f"{condition.text}: {model.name} ({named.name})"
    if metric.is_accuracy and _describe_images(reference.result) != _describe_images(named.result):
        raise UsageError(
            f"--fail-if {condition.text}: {named.path} has other images than {reference.path} "
            f"({_describe_images(named.result)}, not {_describe_images(reference.result)}). Measure on the same images."
        )
    reference_model = _find_model(condition, reference, named, model)
    value, before = metric.read(model), metric.read(reference_model)
    reason = _find_obstacle(condition, named, value) or _find_obstacle(condition, reference, before)
    if reason or (not before and condition.is_ratio):
        return True, f"{subject}: not checked: {reason or 'the first value is 0'}"
    assert value is not None and before is not None
    change = round(100 * (value / before - 1) if condition.is_ratio else value - before, 9)
    unit = " %" if condition.is_ratio else metric.difference_unit
    texts = _format_value(condition, reference_model, before), _format_value(condition, model, value)
    line = f"{subject}: {texts[0]} in {reference.name}, now {texts[1]}: {change:+.2f}{unit}"
    return OPERATORS[condition.operator](change, condition.limit), line


def _find_model(
    condition: FailCondition, reference: NamedResult, named: NamedResult, model: ModelResult
) -> ModelResult:
    """Return the model of the same name in the first result, or its only one if both results have one model."""
    models = {candidate.name: candidate for candidate in reference.result.models}
    if model.name in models:
        return models[model.name]
    if len(models) == len(named.result.models) == 1:
        return reference.result.models[0]
    raise UsageError(
        f"--fail-if {condition.text}: {reference.path} has no model {model.name} of {named.path}, but "
        f"{', '.join(models)}. Use the same --names for both measurements."
    )


def _find_obstacle(condition: FailCondition, named: NamedResult, value: float | None) -> str:
    """Return why a value cannot be checked, or an empty string."""
    if value is None:
        return f"{condition.metric} was not measured in {named.name}"
    if METRICS[condition.metric].is_accuracy and not _has_enough_images(named.result):
        return f"fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons in {named.name}"
    if condition.metric.startswith("mr") and value >= 100:
        return f"the model detects no person in {named.name}"
    return ""


def _has_enough_images(result: BenchResult) -> bool:
    return result.num_images >= MIN_IMAGES and result.models[0].num_gt[REASONABLE.name] >= MIN_PERSONS


def _format_value(condition: FailCondition, model: ModelResult, value: float) -> str:
    setup = {"mr": REASONABLE.name, "mr_all": "All"}.get(condition.metric)
    interval = model.accuracy[0].intervals.get(setup) if setup else None
    return f"{value:.2f}{METRICS[condition.metric].unit}" + (f" ({format_interval(interval)})" if interval else "")


def _describe_images(result: BenchResult) -> str:
    num_gt = result.models[0].num_gt[REASONABLE.name]
    return f"{format_data_name(result.data)} {result.split}, {result.num_images} images with {num_gt} boxes"


def _write_differences(output_dir: Path, data: str, files: Sequence[Path], results: Sequence[NamedResult]) -> None:
    """Write the pages of `write_difference_pages` for all models of all results.

    Args:
        output_dir: Directory of the pages.
        data: Dataset of the results.
        files: Detections of each model.
        results: The results, on the same images.

    Raises:
        UsageError: The number of files does not fit, or the results have different images or no threshold.
    """
    models = [(named, model) for named in results for model in named.result.models]
    if len(files) != len(models) or len(models) == 1:
        raise UsageError(f"--detections: expected {max(2, len(models))} files, one per model, got {len(files)}.")
    if len({_describe_images(named.result) for named in results}) > 1:
        raise UsageError("--differences: the results have different images. Measure on the same images.")
    first = results[0].result
    samples = load_dataset(data, first.split)[: first.num_images]
    category_id = find_category_id(data, first.split)
    compared = []
    for path, (named, model) in zip(files, models, strict=True):
        threshold = model.accuracy[0].threshold
        if threshold is None:
            raise UsageError(f"--differences: {named.path} has no person of Reasonable. Measure with --data.")
        name = model.name if len(results) == 1 else f"{model.name} ({named.name})"
        compared.append(ComparedModel(name, threshold, read_detections(path, samples, category_id)))
    write_difference_pages(output_dir, format_data_name(data), samples, compared)


def make_compare_rows(results: Sequence[NamedResult]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of the table, one row per model of each result.

    Args:
        results: The results.
    """
    headers = ["result", "model", "backend", "MR^-2, %", "95 % interval", "AP50, %", "recall, %"]
    energy = ["energy, mJ"] if any(named.result.has_energy for named in results) else []
    headers += ["p50, ms", "p90, ms", "p99, ms", "memory, MiB", *energy, "Pareto"]
    rows = []
    for named in results:
        optimal = plots.find_pareto_front(list(named.result.models))
        for model in named.result.models:
            interval = model.accuracy[0].intervals.get(REASONABLE.name)
            rates = [METRICS[name].read(model) for name in ("mr", "ap50", "recall")]
            texts = [
                "-" if rate is None else f"{rate:.{digits}f}" for rate, digits in zip(rates, (2, 1, 1), strict=True)
            ]
            latency = model.latency
            rows.append(
                [
                    named.name,
                    format_model_name(model),
                    model.backend,
                    texts[0],
                    format_interval(interval) if interval else "-",
                    *texts[1:],
                    *(f"{value:.1f}" for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
                    f"{model.peak_memory_mib:.0f}",
                    *(_format_energy(model) for _ in energy),
                    "yes" if model in optimal else "",
                ]
            )
    return headers, rows


def _format_energy(model: ModelResult) -> str:
    joules = model.energy.joules_per_frame
    return "-" if joules is None else f"{1e3 * joules:.1f}"


def format_compare_table(results: Sequence[NamedResult]) -> str:
    """Format all models of all results as one table.

    Args:
        results: The results.
    """
    headers, rows = make_compare_rows(results)
    return format_table(rows, headers, align=["left"] * 3 + ["right"] * (len(headers) - 4) + ["left"])


def make_compare_notes(results: Sequence[NamedResult]) -> list[str]:
    """Return the conditions of each measurement, and what cannot be compared.

    Args:
        results: The results.
    """
    notes = ["Pareto: no other model of the same result has both a lower miss rate and a lower p50."]
    for named in results:
        result = named.result
        fields = {field.name: field.value for field in result.host}
        parts = [fields.get("CPU") or "unknown CPU", f"device {result.device}"]
        parts += [f"{result.threads or 'default'} threads", f"{result.runs} runs", result.date[:10]]
        notes.append(f"{named.name}: {', '.join(parts)}; {_describe_images(result)}.")
        if result.power.sensors:
            scopes = "; ".join(f"{name}: {scope}" for name, scope in result.power.sensors.items())
            notes.append(f"{named.name}: energy by {scopes}.")
        marked = [model for model in result.models if model.conditions.marks]
        notes += [f"{MARK} {model.name} ({named.name}): {'; '.join(model.conditions.marks)}." for model in marked]
        if result.num_images and not _has_enough_images(result):
            notes.append(
                f"{named.name}: fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons: miss rates are not compared."
            )
    if len({_describe_images(named.result) for named in results}) > 1:
        notes.append(
            "The results have different images: miss rate, AP and recall of different results are not comparable."
        )
    return notes


def write_compare_page(path: Path, results: Sequence[NamedResult], checks: Sequence[tuple[bool, str]]) -> None:
    """Write table, plot and conditions as one self-contained HTML file.

    Args:
        path: Output file (.html).
        results: The results.
        checks: Result and line of each condition.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    headers, rows = make_compare_rows(results)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"hkd-bench: {', '.join(named.name for named in results)}",
        headers=headers,
        rows=rows,
        notes=make_compare_notes(results),
        checks=checks,
        has_energy=any(named.result.has_energy for named in results),
        plot=Markup(plots.plot_pareto({named.name: list(named.result.models) for named in results})),
    )
    write_text(path, page)
