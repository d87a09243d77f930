"""The models side by side: as text for the terminal, as Markdown for a README, as cells for the page.

The scores as a table for the terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hkd_bench.result import BenchResult, ModelResult, confidence_bound_ms
from hkd_bench.scoring import ScoreResult


@dataclass(frozen=True)
class Column:
    """One figure of a model. digits: after the point. ratio: worth comparing with the first model's."""

    title: str
    unit: str
    digits: int
    ratio: bool = False


@dataclass(frozen=True)
class Cell:
    """`value` as text, "-" where there is none; `ratio` to the first model, as text, or empty."""

    value: str
    ratio: str


MAX_CV = 0.1  # standard deviation over mean; an idle machine with fixed clocks stays below 0.025 (trtexec's alarm)


COLUMNS = (
    Column("parameters", "M", 2, ratio=True),
    Column("GFLOPs", "", 2, ratio=True),
    Column("file", "MiB", 1, ratio=True),
    Column("MR^-2 Reasonable", "%", 2),
    Column("MR^-2 All", "%", 2),
    Column("p50", "ms", 1, ratio=True),
    Column("p90", "ms", 1, ratio=True),
    Column("p99", "ms", 1, ratio=True),
    Column("pictures/s", "", 1, ratio=True),
    Column("peak memory", "MiB", 0, ratio=True),
)


def make_cells(result: BenchResult) -> list[list[Cell]]:
    """A row a model, a cell a column of COLUMNS."""
    rows = [_collect_metrics(model) for model in result.models]
    nothing: Sequence[float | None] = [None] * len(COLUMNS)  # the first model is not compared with itself
    return [
        [_make_cell(*each) for each in zip(COLUMNS, row, rows[0] if number else nothing, strict=True)]
        for number, row in enumerate(rows)
    ]


def format_text_table(result: BenchResult) -> str:
    """Aligned columns; below each further model its ratios to the first."""
    grid = [["", *(column.title for column in COLUMNS)], ["", *(column.unit for column in COLUMNS)]]
    for model, row in zip(result.models, make_cells(result), strict=True):
        grid.append([model.name, *(cell.value for cell in row)])
        if any(cell.ratio for cell in row):
            grid.append(["", *(cell.ratio for cell in row)])
    widths = [max(len(line[place]) for line in grid) for place in range(len(grid[0]))]
    lines = [
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in grid
    ]
    return "\n".join([*lines, "", *make_notes(result)])


def format_markdown_table(result: BenchResult) -> str:
    """A GitHub table; ratios to the first model in brackets."""
    titles = ["model", *(column.title + (f" ({column.unit})" if column.unit else "") for column in COLUMNS)]
    rows = [
        [model.name, *(cell.value + (f" ({cell.ratio})" if cell.ratio else "") for cell in row)]
        for model, row in zip(result.models, make_cells(result), strict=True)
    ]
    lines = [titles, ["---", *["---:"] * len(COLUMNS)], *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *make_notes(result)])


def make_notes(result: BenchResult) -> list[str]:
    """What a reader must know to read the table."""
    first = result.models[0]
    threads = "the runtime's own number of threads" if result.threads is None else f"{result.threads} threads"
    data, people = f"{result.data or 'unnamed data'}, {result.split or 'no split'}", first.num_gt["Reasonable"]
    lines = [
        f"Miss rate over {result.num_images} pictures ({data}; {people} people in Reasonable)."
        if result.num_images
        else f"No miss rate: {result.data or 'the pictures'} come without annotations.",
        f"Latency of one frame, decoded picture to boxes, on {result.device} with {threads}, {_format_backends(result)}: "
        f"{result.runs} runs in "
        f"{result.rounds} processes, after {result.warmup} warm-up runs{_format_warmup(result)} each.",
        *_format_bounds(result),
    ]
    short = [percentile for percentile in (90, 99) if confidence_bound_ms(first.e2e_ms, percentile) is None]
    if short:
        names = " and ".join(f"p{percentile}" for percentile in short)
        lines.append(f"{names}: of too few runs for a 99 % bound (p90 takes 64 runs, p99 662): read as an indication.")
    return lines


def _format_backends(result: BenchResult) -> str:
    """What ran the models; which ran which, where the names do not say it."""
    backends = list(dict.fromkeys(model.backend for model in result.models))
    if len(backends) == 1 or all(model.backend in model.name for model in result.models):
        return f"by {', '.join(backends)}"
    return "by " + ", ".join(f"{model.backend} ({model.name})" for model in result.models)


def _format_warmup(result: BenchResult) -> str:
    return f" and at least {result.warmup_s:g} s" if result.warmup_s else ""


def _format_bounds(result: BenchResult) -> list[str]:
    """What the runs can vouch for."""
    lines = []
    for percentile in (90, 99):
        bounds = [confidence_bound_ms(model.e2e_ms, percentile) for model in result.models]
        told = [f"{bound:.1f} ms ({model.name})" for model, bound in zip(result.models, bounds, strict=True) if bound]
        if told:
            lines.append(f"With 99 % confidence p{percentile} is at most {', '.join(told)}.")
    unsteady = [
        f"{100 * model.latency.cv:.0f} % ({model.name})" for model in result.models if model.latency.cv > MAX_CV
    ]
    if unsteady:
        lines.append(
            f"The times scatter by {', '.join(unsteady)} of their mean: other work on the machine, or clocks that are "
            "not fixed; p90 and p99 tell of that as much as of the model."
        )
    return lines


def _collect_metrics(model: ModelResult) -> Sequence[float | None]:
    latency = model.latency
    return (
        model.parameters / 1e6,
        model.flops / 1e9,
        model.file_mib,
        _to_percent(model.miss_rates["Reasonable"]),
        _to_percent(model.miss_rates["All"]),
        latency.p50_ms,
        latency.p90_ms,
        latency.p99_ms,
        1e3 / latency.mean_ms,
        model.peak_memory_mib,
    )


def _to_percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _make_cell(column: Column, value: float | None, first: float | None) -> Cell:
    if value is None:
        return Cell("-", "")
    return Cell(f"{value:.{column.digits}f}", f"x {value / first:.2f}" if column.ratio and first else "")


def format_score_table(scores: Mapping[str, ScoreResult]) -> str:
    """A row a setup (or COCO figure), a column a detection file; per cent."""
    first = next(iter(scores.values()))
    if first.coco_metrics:
        rows = [
            [name, *(_format_score_percent(one.coco_metrics[name]) for one in scores.values())]
            for name in first.coco_metrics
        ]
        head = ["COCO, %", *scores]
    else:
        rows = [
            [name, str(rate.num_gt), *(_format_score_percent(one.miss_rates[name].value) for one in scores.values())]
            for name, rate in first.miss_rates.items()
        ]
        head = ["MR^-2, %", "people", *scores]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


def _format_score_percent(value: float) -> str:
    """-1 stands for nobody of that kind."""
    return "-" if value < 0 else f"{100 * value:.2f}"
