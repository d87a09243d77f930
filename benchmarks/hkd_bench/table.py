"""Tables of `hkd-bench` and `hkd-bench score`: text for the terminal, Markdown, and cells for the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hkd_bench.cameras import CameraPoint
from hkd_bench.device_state import format_other_load
from hkd_bench.latency import confidence_bound_ms
from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.scoring import ScoreTable
from hkd_bench.separate_tables import (
    SCENARIO_HEADERS,
    SUSTAINED_HEADERS,
    format_scenario_notes,
    format_sustained_notes,
    make_scenario_rows,
    make_sustained_rows,
)
from hkd_deploy.model_metadata import MIN_DYNAMIC_SIDE
from hkd_det.console import format_table
from hkd_det.metrics.bootstrap import MIN_IMAGES, MIN_PERSONS, TOO_FEW, MissRateDifference, MissRateInterval

SHOWN_SETUPS = ("Reasonable", "All")
MAX_CV = 0.1  # an idle machine with fixed clocks stays below 0.025, the warning limit of trtexec

# Interval of each detector and its difference to the first one, by ground truth or setup, and by name.
AccuracyGroups = dict[str, dict[str, tuple[MissRateInterval, MissRateDifference | None]]]


@dataclass(frozen=True)
class Column:
    """One metric of a model.

    Attributes:
        title: Name of the metric.
        unit: Unit, or empty.
        digits: Digits after the decimal point.
        ratio: True if the ratio to the first model is shown.
    """

    title: str
    unit: str
    digits: int
    ratio: bool = False


@dataclass(frozen=True)
class Cell:
    """Text of one metric of one model.

    Attributes:
        value: Value, or "-" if it was not measured.
        ratio: Ratio to the first model, or empty.
    """

    value: str
    ratio: str


COLUMNS = (
    Column("parameters", "M", 2, ratio=True),
    Column("GFLOPs", "", 2, ratio=True),
    Column("file", "MiB", 1, ratio=True),
    Column("MR^-2 Reasonable", "%", 2),
    Column("MR^-2 All", "%", 2),
    Column("AP50", "%", 1),
    Column("AP", "%", 1),
    Column("recall", "%", 1),
    Column("p50", "ms", 1, ratio=True),
    Column("p90", "ms", 1, ratio=True),
    Column("p99", "ms", 1, ratio=True),
    Column("images/s", "", 1, ratio=True),
    Column("peak memory", "MiB", 0, ratio=True),
)
GPU_COLUMNS = (Column("GPU memory", "MiB", 0, ratio=True),)
ENERGY_COLUMNS = (
    Column("energy per frame", "mJ", 1, ratio=True),
    Column("above idle", "mJ", 1, ratio=True),
)
CAMERA_HEADERS = ("cameras", "number", "p50, ms", "p99, ms", "dropped, %", "held")
CAMERA_ENERGY_HEADER = "energy per camera, J/s"
BATCH_HEADERS = ("batches", "images", "p50, ms", "p99, ms", "images/s", "held")
MARK = "[!]"  # behind the name of a model whose runs were not quiet


def list_columns(result: BenchResult) -> list[Column]:
    """Return the columns of a result: GPU memory only for a GPU, energy only if it was requested.

    Args:
        result: Measurements of all models.
    """
    gpu = GPU_COLUMNS if result.device.startswith("cuda") else ()
    return [*COLUMNS, *gpu, *(ENERGY_COLUMNS if result.has_energy else ())]


def make_cells(result: BenchResult) -> list[list[Cell]]:
    """Return one row per model with one cell per entry of `list_columns`.

    Args:
        result: Measurements of all models.
    """
    columns = list_columns(result)
    rows = [_collect_metrics(model, columns) for model in result.models]
    no_reference: Sequence[float | None] = [None] * len(columns)  # the first model has no ratios
    return [
        [_make_cell(*column) for column in zip(columns, row, rows[0] if index else no_reference, strict=True)]
        for index, row in enumerate(rows)
    ]


def format_text_table(result: BenchResult) -> str:
    """Format a result for the terminal: per model a row of values and a row of ratios to the first model, and notes.

    Args:
        result: Measurements of all models.

    Returns:
        The table, the intervals of the miss rates, and notes.
    """
    columns = list_columns(result)
    rows = [["", *(column.unit for column in columns)]]
    for model, cells in zip(result.models, make_cells(result), strict=True):
        rows.append([format_model_name(model), *(cell.value for cell in cells)])
        if any(cell.ratio for cell in cells):
            rows.append(["", *(cell.ratio for cell in cells)])
    parts = [format_table(rows, ["", *(column.title for column in columns)]), ""]
    groups = group_accuracy(result)
    if groups:
        parts += [format_comparison_table(groups), ""]
    cameras = make_camera_rows(result)
    if cameras:
        parts += [format_table(cameras, list_camera_headers(result)), ""]
        parts += [format_table(make_batch_rows(result), BATCH_HEADERS), ""]
    scenarios = make_scenario_rows(result)
    if scenarios:
        parts += [format_table(scenarios, SCENARIO_HEADERS), ""]
    sustained = make_sustained_rows(result)
    if sustained:
        parts += [format_table(sustained, SUSTAINED_HEADERS), ""]
    return "\n".join([*parts, *make_notes(result)])


def format_markdown_table(result: BenchResult) -> str:
    """Format a result as a Markdown table with the ratios to the first model in parentheses, and notes.

    Args:
        result: Measurements of all models.

    Returns:
        The table and the notes below it.
    """
    headers = [
        "model",
        *(column.title + (f" ({column.unit})" if column.unit else "") for column in list_columns(result)),
    ]
    rows = [
        [format_model_name(model), *(cell.value + (f" ({cell.ratio})" if cell.ratio else "") for cell in cells)]
        for model, cells in zip(result.models, make_cells(result), strict=True)
    ]
    parts = [format_table(rows, headers, style="github"), ""]
    groups = group_accuracy(result)
    if groups:
        parts += [format_comparison_table(groups, style="github"), ""]
    return "\n".join([*parts, *make_notes(result)])


def group_accuracy(result: BenchResult) -> AccuracyGroups:
    """Return the intervals and differences of the setups Reasonable and All on each ground truth.

    Args:
        result: Measurements of all models.
    """
    groups: AccuracyGroups = {}
    for index, first in enumerate(result.models[0].accuracy):
        for setup in SHOWN_SETUPS:
            label = f"{setup} ({format_data_name(first.data)})" if len(result.models[0].accuracy) > 1 else setup
            if setup in first.intervals:
                groups[label] = {
                    model.name: (model.accuracy[index].intervals[setup], model.accuracy[index].differences.get(setup))
                    for model in result.models
                }
    return groups


def format_data_name(data: str) -> str:
    """Return the name of a dataset for a table: the file name without suffix.

    Args:
        data: Name of a dataset, or path of its YAML file.
    """
    return Path(data).stem


def format_score_table(table: ScoreTable) -> str:
    """Format scores in percent: one row per setup or metric, one column per detection file.

    Args:
        table: Scores of at least one detection file.

    Returns:
        The table and, below it, the intervals of the miss rates and the differences to the first file.
    """
    scores = table.scores
    first_name, first = next(iter(scores.items()))
    rows = [
        [name, str(rate.num_gt), *(_format_score(score.miss_rates[name].value) for score in scores.values())]
        for name, rate in first.miss_rates.items()
    ]
    rows += [[name, "", *(_format_score(score.metrics[name]) for score in scores.values())] for name in first.metrics]
    headers = ["MR^-2, %" if first.miss_rates else "%", "boxes" if first.miss_rates else "", *scores]
    groups = {
        setup: {
            name: (table.intervals[name][setup], table.differences.get(name, {}).get(setup)) for name in table.scores
        }
        for setup in table.intervals.get(first_name, {})
    }
    return "\n\n".join([format_table(rows, headers), *([format_comparison_table(groups)] if groups else [])])


def format_comparison_table(groups: AccuracyGroups, style: str = "plain") -> str:
    """Format miss rates with their intervals and the differences to the first detector, one row per detector.

    Args:
        groups: Interval and difference of each detector, by ground truth or setup, and by name; at least one.
        style: `plain` for the terminal, `github` for Markdown.

    Returns:
        The table.
    """
    reference_name = next(iter(next(iter(groups.values()))))
    has_differences = any(difference for group in groups.values() for _, difference in group.values())
    rows = []
    for label, group in groups.items():
        for index, (name, (interval, difference)) in enumerate(group.items()):
            row = ["" if index else label, name, f"{100 * interval.value:.2f}", format_interval(interval)]
            if has_differences:
                row.append(format_difference(difference, name, reference_name) if difference else "")
            rows.append(row)
    headers = ["MR^-2, %", "", "", "95 % interval"] + [f"difference to {reference_name}"] * has_differences
    return format_table(rows, headers, style, align=["left", "left", "right", "right", "left"][: len(headers)])


def format_interval(interval: MissRateInterval) -> str:
    """Format a 95 % interval of a miss rate in percent.

    Args:
        interval: The interval.

    Returns:
        For example "8.1 to 12.9".
    """
    return f"{100 * interval.ci_low:.1f} to {100 * interval.ci_high:.1f}"


def format_difference(difference: MissRateDifference, name: str, reference_name: str) -> str:
    """Format a difference in percentage points with its conclusion.

    Args:
        difference: Miss rate of a detector minus that of the reference.
        name: Name of the detector.
        reference_name: Name of the reference.

    Returns:
        For example "+1.20 (-0.3 to +2.7), p = 0.12: no difference shown".
    """
    conclusions = {
        "better": f"{name} is better",
        "worse": f"{reference_name} is better",
        "too few images or persons": TOO_FEW,
    }
    conclusion = conclusions.get(difference.conclusion, difference.conclusion)
    interval = f"{100 * difference.ci_low:+.1f} to {100 * difference.ci_high:+.1f}"
    has_p_value = difference.conclusion in ("better", "worse", "no difference shown")
    p_value = f", p = {difference.p_value:.2g}" if has_p_value else ""
    return f"{100 * difference.value:+.2f} ({interval}){p_value}: {conclusion}"


def make_notes(result: BenchResult) -> list[str]:
    """Return the sentences below a table: data, conditions of the measurement and confidence of the percentiles.

    Args:
        result: Measurements of all models.
    """
    first = result.models[0]
    threads = "the runtime's default threads" if result.threads is None else f"{result.threads} threads"
    data = f"{result.data or 'unnamed data'}, {result.split or 'no split'}"
    warmup = f" and at least {result.warmup_s:g} s" if result.warmup_s else ""
    notes = [
        f"Miss rate over {result.num_images} images ({data}; {first.num_gt['Reasonable']} boxes in Reasonable)."
        if result.num_images
        else f"Miss rate not measured: {result.data or 'the images'}: no annotations.",
        *_format_blind_models(result),
        *_format_few_images(result),
        *_format_thresholds(result),
        *_format_rate_intervals(result),
        f"Latency from decoded frame to boxes on {result.device} with {threads}, {_format_backends(result)}: "
        f"{result.runs} runs in {result.rounds} processes, each after {result.warmup} warm-up runs{warmup}.",
        *_format_padded_sizes(result),
        *_format_cameras(result),
        *format_scenario_notes(result),
        *format_sustained_notes(result),
        *_format_bounds(result),
        *_format_energy(result),
        *_format_build_memory(result),
        *_format_gpu_memory(result),
        f"License of the weights: {_format_licenses(result)}.",
    ]
    too_few = [percentile for percentile in (90, 99) if confidence_bound_ms(first.e2e_ms, percentile) is None]
    if too_few:
        names = " and ".join(f"p{percentile}" for percentile in too_few)
        notes.append(f"{names}: too few runs for a 99 % confidence bound (p90 needs 64 runs, p99 needs 662).")
    marked = [model for model in result.models if model.conditions.marks]
    return notes + [f"{MARK} {model.name}: {'; '.join(model.conditions.marks)}." for model in marked]


def format_model_name(model: ModelResult) -> str:
    """Return the name of a model, with a mark if its runs were not quiet.

    Args:
        model: Measurements of the model.
    """
    return f"{model.name} {MARK}" if model.conditions.marks else model.name


def _format_energy(result: BenchResult) -> list[str]:
    if not result.has_energy:
        return []
    reasons = dict.fromkeys(model.energy.reason for model in result.models if model.energy.reason)
    notes = [f"Energy not measured: {reason}." for reason in reasons]
    texts = [
        f"{format_energy_interval(energy.ci_low, energy.ci_high)} mJ, above idle "
        f"{format_energy_interval(energy.above_idle_low, energy.above_idle_high)} mJ ({model.name})"
        for model in result.models
        if (energy := model.energy).joules_per_frame is not None
    ]
    if not texts:
        return notes
    power = result.power
    sensors = "; ".join(f"{name}: {scope}" for name, scope in power.sensors.items())
    missing = "".join(f" Without {name}: {reason}." for name, reason in power.missing.items())
    idle = f"{_format_watts(power.idle_before_w)} before and {_format_watts(power.idle_after_w)} after"
    usable_cpus = result.state_before.usable_cpus if result.state_before else 1
    load = format_other_load(power.idle_other_cpus, usable_cpus)
    return [
        *notes,
        f"Energy per frame, 95 % intervals: {'; '.join(texts)}.",
        f"Measured by {sensors}.{missing} Idle power: {idle} the measurement.",
        *([f"{MARK} idle power: {load}; energy above idle is too low."] if load else []),
    ]


def format_energy_interval(low: float | None, high: float | None) -> str:
    """Format the interval of an energy in millijoules.

    Args:
        low: Lower end in joules; None if it was not measured.
        high: Upper end.

    Returns:
        For example "310.2 to 318.9".
    """
    return "" if low is None or high is None else f"{1e3 * low:.1f} to {1e3 * high:.1f}"


def _format_watts(watts: float | None) -> str:
    return "unknown" if watts is None else f"{watts:.2f} W"


def _format_build_memory(result: BenchResult) -> list[str]:
    texts = [
        f"{model.build_memory_mib:.0f} MiB ({model.name})"
        for model in result.models
        if model.build_memory_mib is not None
    ]
    return [f"Peak memory while the engine or session was built: {', '.join(texts)}."] if texts else []


def _format_gpu_memory(result: BenchResult) -> list[str]:
    if not result.device.startswith("cuda"):
        return []
    if result.state_before and result.state_before.is_memory_unified:
        used = [f"{model.conditions.memory_used_mib or 0:.0f} MiB ({model.name})" for model in result.models]
        before = f"{result.state_before.memory_used_mib:.0f} MiB"
        return [
            f"Unified memory: the CPU and the GPU share it. In use on the machine: {before} before, at most "
            f"{', '.join(used)} during the runs."
        ]
    reasons = dict.fromkeys(model.gpu_memory_reason for model in result.models if model.gpu_memory_reason)
    return [f"GPU memory not measured: {reason}." for reason in reasons]


def _format_blind_models(result: BenchResult) -> list[str]:
    """Name the models whose every miss rate is 100 %."""
    notes = []
    for model in result.models:
        for accuracy in model.accuracy:
            rates = [rate for rate in accuracy.miss_rates.values() if rate is not None]
            if rates and min(rates) == 1:
                notes.append(f"{model.name} detects no person of {accuracy.data}: check its input and the annotations.")
    return notes


def _format_few_images(result: BenchResult) -> list[str]:
    num_gt = result.models[0].num_gt["Reasonable"]
    if not result.num_images or (result.num_images >= MIN_IMAGES and num_gt >= MIN_PERSONS):
        return []
    return [
        f"Fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons of Reasonable: the intervals are too narrow. "
        "Models are not compared."
    ]


def _format_thresholds(result: BenchResult) -> list[str]:
    sources = {"model": "stored in the model", "images": "with the highest F1 score on these images"}
    texts = []
    for source, description in sources.items():
        names = [
            f"{model.accuracy[0].threshold:.3f} ({model.name})"
            for model in result.models
            if model.accuracy[0].threshold is not None and model.accuracy[0].threshold_source == source
        ]
        texts += [f"{', '.join(names)}, {description}"] if names else []
    return [f"Recall of Reasonable at a score of {'; '.join(texts)}."] if texts else []


def list_camera_headers(result: BenchResult) -> list[str]:
    """Return the headers of the table of cameras: energy only if it was requested.

    Args:
        result: Measurements of all models.
    """
    return [*CAMERA_HEADERS, *([CAMERA_ENERGY_HEADER] if result.has_energy else [])]


def _format_camera_energy(point: CameraPoint) -> str:
    return "-" if point.joules_per_camera_s is None else f"{point.joules_per_camera_s:.2f}"


def _format_rate_intervals(result: BenchResult) -> list[str]:
    """State the 95 % intervals of AP50, AP and recall."""
    texts = []
    for model in result.models:
        accuracy = model.accuracy[0]
        named = (("AP50", accuracy.ap50_interval), ("AP", accuracy.ap_interval), ("recall", accuracy.recall_interval))
        parts = [f"{name} {100 * ends[0]:.1f} to {100 * ends[1]:.1f}" for name, ends in named if ends]
        texts += [f"{', '.join(parts)} ({model.name})"] if parts else []
    return [f"95 % intervals over images: {'; '.join(texts)}."] if texts else []


def make_camera_rows(result: BenchResult) -> list[list[str]]:
    """Return one row per model and number of cameras, with the entries of `list_camera_headers`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if index else model.name,
            str(point.cameras),
            *("-" if value is None else f"{value:.1f}" for value in (point.p50_ms, point.p99_ms)),
            f"{100 * point.dropped:.1f}",
            "yes" if point.is_held(cameras.fps) else "no",
            *([_format_camera_energy(point)] if result.has_energy else []),
        ]
        for model in result.models
        if (cameras := model.cameras)
        for index, point in enumerate(cameras.points)
    ]


def make_batch_rows(result: BenchResult) -> list[list[str]]:
    """Return one row per model and batch size, with the entries of `BATCH_HEADERS`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if index else model.name,
            str(point.batch),
            *(f"{value:.1f}" for value in (point.p50_ms, point.p99_ms, point.images_per_s)),
            "yes" if point.is_held(cameras.fps) else "no",
        ]
        for model in result.models
        if (cameras := model.cameras)
        for index, point in enumerate(cameras.batches)
    ]


def _format_cameras(result: BenchResult) -> list[str]:
    found = [(model, model.cameras) for model in result.models if model.cameras]
    if not found:
        return []
    fps = found[0][1].fps
    counts = ", ".join(f"{cameras.cameras} ({model.name})" for model, cameras in found)
    notes = [
        f"Cameras at {fps:g} frames per second with p99 from the arrival of a frame to its boxes below "
        f"{1e3 / fps:.1f} ms: {counts}. A dropped frame counts as infinite."
    ]
    batches = [
        f"{cameras.largest_batch} ({model.name})" for model, cameras in found if cameras.largest_batch is not None
    ]
    if batches:
        fixed = [model.name for model, cameras in found if len(cameras.batches) == 1 and cameras.largest_batch]
        hint = f" The batch of {', '.join(fixed)} is fixed; see hkd-export --dynamic batch." if fixed else ""
        notes.append(
            f"Largest batch of frames that arrive together, with p99 below the period: {', '.join(batches)}.{hint}"
        )
    if not result.has_energy:
        return notes
    reasons = dict.fromkeys(cameras.energy_reason for _, cameras in found if cameras.energy_reason)
    return notes + [f"Energy per camera not measured: {reason}." for reason in reasons]


def _format_padded_sizes(result: BenchResult) -> list[str]:
    """Name the inputs that the graph of a model with a dynamic size pads to its smallest side."""
    if not result.imgsz_sweep:
        return []
    names = [model.name for model in result.models if min(model.imgsz_hw) < MIN_DYNAMIC_SIDE]
    limit = f"{MIN_DYNAMIC_SIDE} pixels, or to the side of the export if that is smaller"
    return [f"The graph pads shorter sides to {limit}, which takes time: {', '.join(names)}."] if names else []


def _format_licenses(result: BenchResult) -> str:
    names_by_license: dict[str, list[str]] = {}
    for model in result.models:
        names_by_license.setdefault(model.license, []).append(model.name)
    return "; ".join(f"{license_text} ({', '.join(names)})" for license_text, names in names_by_license.items())


def _format_backends(result: BenchResult) -> str:
    """List the backends, with the names of their models if these do not contain the backend."""
    backends = list(dict.fromkeys(model.backend for model in result.models))
    if len(backends) == 1 or all(model.backend in model.name for model in result.models):
        return f"by {', '.join(backends)}"
    return "by " + ", ".join(f"{model.backend} ({model.name})" for model in result.models)


def _format_bounds(result: BenchResult) -> list[str]:
    notes = []
    for percentile in (90, 99):
        bounds = [confidence_bound_ms(model.e2e_ms, percentile) for model in result.models]
        texts = [f"{bound:.1f} ms ({model.name})" for model, bound in zip(result.models, bounds, strict=True) if bound]
        if texts:
            notes.append(f"With 99 % confidence, p{percentile} is at most {', '.join(texts)}.")
    unsteady = [
        f"{100 * model.latency.cv:.0f} % ({model.name})" for model in result.models if model.latency.cv > MAX_CV
    ]
    if unsteady:
        notes.append(
            f"The standard deviation of the latency is {', '.join(unsteady)} of the mean. Other processes or variable "
            "clock rates affect p90 and p99."
        )
    return notes


def _collect_metrics(model: ModelResult, columns: Sequence[Column]) -> Sequence[float | None]:
    """Return the values of the columns."""
    latency, accuracy, energy = model.latency, model.accuracy[0], model.energy
    values: tuple[float | None, ...] = (
        model.parameters / 1e6,
        None if model.flops is None else model.flops / 1e9,
        model.file_mib,
        *(_to_percent(model.miss_rates[setup]) for setup in SHOWN_SETUPS),
        *(_to_percent(value) for value in (accuracy.ap50, accuracy.ap, accuracy.recall)),
        latency.p50_ms,
        latency.p90_ms,
        latency.p99_ms,
        1e3 / latency.mean_ms,
        model.peak_memory_mib,
        model.gpu_memory_mib,
        None if energy.joules_per_frame is None else 1e3 * energy.joules_per_frame,
        None if energy.above_idle is None else 1e3 * energy.above_idle,
    )
    by_column = dict(zip((*COLUMNS, *GPU_COLUMNS, *ENERGY_COLUMNS), values, strict=True))
    return [by_column[column] for column in columns]


def _to_percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _make_cell(column: Column, value: float | None, reference: float | None) -> Cell:
    if value is None:
        return Cell("-", "")
    return Cell(f"{value:.{column.digits}f}", f"x {value / reference:.2f}" if column.ratio and reference else "")


def _format_score(value: float) -> str:
    """Format a fraction in percent; negative values mean that there is no ground truth."""
    return "-" if value < 0 else f"{100 * value:.2f}"
