"""Tables of `hkd-bench` and `hkd-bench score`: text for the terminal, Markdown, and cells for the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.scoring import ScoreTable
from hkd_bench.separate_tables import (
    BATCH_HEADERS,
    SCENARIO_HEADERS,
    SUSTAINED_HEADERS,
    list_camera_headers,
    make_batch_rows,
    make_camera_rows,
    make_scenario_rows,
    make_sustained_rows,
)
from hkd_bench.table_notes import format_model_name, make_notes
from hkd_det.console import format_table
from hkd_det.metrics.bootstrap import TOO_FEW, MissRateDifference, MissRateInterval

SHOWN_SETUPS = ("Reasonable", "All")
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
