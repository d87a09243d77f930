"""Plots of `hkd-bench`: inline SVG for the report, and the miss-rate plot of `hkd-bench score` as a file.

The SVG keeps text as text and follows the light or dark colors of the page.
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.scoring import ScoreResult
from hkd_det.errors import DataError
from hkd_det.files import atomic_write
from hkd_det.metrics.citypersons import FPPI_POINTS, REASONABLE

PLOT_SUFFIXES = (".svg", ".png", ".pdf")
MAX_COLUMNS = 3
# Palette of Okabe and Ito (2008) for color-blind readers, without the colors that vanish on white or black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # for print without color
TEXT_COLOR, GRID_COLOR = "#010203", "#040506"  # placeholders that are replaced by the colors of the page
RC_PARAMS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model name may contain $
    "svg.hashsalt": "hkd",
    "font.size": 9.5,
    "text.color": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.7,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
FIGURE_SIZE_INCH = (5.4, 3.7)  # 389 points wide: readable on a phone of that width
PARETO_SIZE_INCH = (9.6, 4.2)
MARKERS = ("o", "s", "^", "D", "v", "P")
MISS_RATE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.64, 0.8, 1.0)


def plot_miss_rate(result: BenchResult, setup: str = REASONABLE.name) -> str:
    """Plot miss rate against false positives per image on logarithmic axes, with MR^-2 in the legend.

    Args:
        result: Measurements of all models.
        setup: Reasonable or All.

    Returns:
        Inline SVG, or an empty string if no curve was measured.
    """
    if not any(model.num_gt[setup] for model in result.models):
        return ""
    accuracies = [model.accuracy[0] for model in result.models]
    curves = [accuracy.curve if setup == REASONABLE.name else accuracy.curve_all for accuracy in accuracies]

    def draw(axes: Axes) -> None:
        lines = [
            (
                f"{format_percent(model.miss_rates[setup])}  {model.name}",
                np.array(curve.fppi),
                np.array(curve.miss_rate),
            )
            for model, curve in zip(result.models, curves, strict=True)
        ]
        draw_miss_rates(axes, lines)

    descriptions = [f"{model.name} {format_percent(model.miss_rates[setup])}" for model in result.models]
    return render_svg(draw, f"Miss rate against false positives per image, {setup}", descriptions)


def draw_miss_rates(
    axes: Axes, lines: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]], band_color: str = GRID_COLOR
) -> None:
    """Draw miss-rate curves on logarithmic axes; the FPPI range of MR^-2 is shaded.

    Args:
        axes: Axes to draw on.
        lines: Label, false positives per image (float64 array[D]) and miss rate (float64 array[D]) of each curve.
        band_color: Color of the shaded range.
    """
    lowest = 1.0
    for index, (label, curve_fppi, curve_miss_rate) in enumerate(lines):
        fppi, miss_rate = np.array([0.0, *curve_fppi]), np.array([1.0, *curve_miss_rate])
        x, y = np.maximum(fppi, 1e-6), np.maximum(miss_rate, 1e-6)  # zeros cannot be drawn on logarithmic axes
        axes.plot(x, y, drawstyle="steps-post", label=label, **_get_line_style(index))
        visible = miss_rate[fppi <= 10]
        lowest = min(lowest, float(visible[visible > 0].min(initial=1.0)))
    floor = max((tick for tick in MISS_RATE_TICKS if tick < lowest), default=MISS_RATE_TICKS[0])
    axes.set(xscale="log", yscale="log", xlim=(10**-2.5, 10), ylim=(min(floor, 0.5), 1.03))
    axes.axvspan(FPPI_POINTS[0], FPPI_POINTS[-1], color=band_color, alpha=0.35, linewidth=0)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in MISS_RATE_TICKS if tick >= min(floor, 0.5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="false positives per image", ylabel="miss rate")
    axes.legend(loc="lower left")


def plot_latency(result: BenchResult) -> str:
    """Plot the cumulative distribution of the latency, with dots at p50, p90 and p99, as inline SVG.

    Args:
        result: Measurements of all models.

    Returns:
        Inline SVG.
    """

    def draw(axes: Axes) -> None:
        for index, model in enumerate(result.models):
            times, latency = np.sort(model.e2e_ms), model.latency
            ratio = np.arange(1, len(times) + 1) / len(times)
            style = _get_line_style(index)
            axes.plot(times, ratio, drawstyle="steps-post", label=f"p50 {latency.p50_ms:.1f} ms  {model.name}", **style)
            marks = [latency.p50_ms, latency.p90_ms, latency.p99_ms]
            axes.plot(marks, (0.5, 0.9, 0.99), "o", color=style["color"], markersize=4.5)
        all_times = np.concatenate([model.e2e_ms for model in result.models])
        if all_times.max() > 6 * all_times.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(format_2_or_5))
        else:
            axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 0.9, 0.99]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"p{100 * value:.0f}" if value else "0"))
        axes.set(xlabel="latency from frame to boxes, ms", ylabel="fraction of runs", ylim=(0, 1.02))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))  # inside the axes it would cover a curve

    return render_svg(
        draw, "Latency distribution", [f"{model.name} p50 {model.latency.p50_ms:.1f} ms" for model in result.models]
    )


def plot_stages(result: BenchResult) -> str:
    """Plot the mean latency of each stage as stacked bars, as inline SVG.

    Args:
        result: Measurements of all models.

    Returns:
        Inline SVG.
    """
    names = ("preprocess", "inference", "postprocess")
    means = np.array([_compute_stage_means(model) for model in result.models])  # [models, 3]
    texts = [" + ".join(f"{mean:.2g}" if mean < 1 else f"{mean:.1f}" for mean in row) + " ms" for row in means]

    def draw(axes: Axes) -> None:
        rows = np.arange(len(means))
        left = np.zeros(len(rows))
        for index, name in enumerate(names):
            axes.barh(rows, means[:, index], left=left, height=0.55, color=COLORS[index], label=name)
            left += means[:, index]
        for row, text in zip(rows, texts, strict=True):
            axes.text(0, row - 0.32, text, va="bottom", fontsize=8.5)
        axes.set_yticks(rows, [model.name for model in result.models])
        axes.set_ylim(len(rows) - 0.6, -0.8)  # the first model at the top, with space for its text
        axes.grid(False, axis="y")
        axes.set(xlabel="mean latency, ms")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)

    descriptions = [f"{model.name} {text}" for model, text in zip(result.models, texts, strict=True)]
    return render_svg(draw, "Latency of each stage", descriptions, height_inch=1.5 + 0.6 * len(result.models))


def plot_training(training: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Plot the validation miss rate after each epoch, with a dot at the best epoch, as inline SVG.

    Args:
        training: Name of each run, with the epoch and the miss rate (fraction) of each evaluation.

    Returns:
        Inline SVG.
    """

    def draw(axes: Axes) -> None:
        for index, (name, history) in enumerate(training.items()):
            epochs, percent = np.array([epoch for epoch, _ in history]), np.array([100 * value for _, value in history])
            style = _get_line_style(index)
            axes.plot(epochs, percent, label=f"{np.nanmin(percent):.2f} %  {name}", **style)
            best = int(np.nanargmin(percent))
            axes.plot(epochs[best], percent[best], "o", color=style["color"], markersize=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="MR^-2 Reasonable, %")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left", title="best epoch")

    descriptions = [
        f"{name} best {100 * np.nanmin([value for _, value in history]):.2f} %" for name, history in training.items()
    ]
    return render_svg(draw, "Miss rate during training", descriptions)


PARETO_AXES: tuple[tuple[str, Callable[[ModelResult], float | None]], ...] = (
    ("p50 latency from frame to boxes, ms", lambda model: model.latency.p50_ms),
    ("peak memory, MiB", lambda model: model.peak_memory_mib),
    ("GPU memory, MiB", lambda model: model.gpu_memory_mib),
    (
        "energy per frame, mJ",
        lambda model: None if model.energy.joules_per_frame is None else 1e3 * model.energy.joules_per_frame,
    ),
)


def find_pareto_front(
    models: Sequence[ModelResult], read_cost: Callable[[ModelResult], float | None] = PARETO_AXES[0][1]
) -> list[ModelResult]:
    """Return the models that no other one beats in miss rate and cost, by ascending cost.

    Args:
        models: Measured models; those without a miss rate of Reasonable or without the cost are left out.
        read_cost: Function that returns the cost, by default p50.
    """
    front: list[ModelResult] = []
    measured = [model for model in models if read_cost(model) is not None]
    for model in sorted(measured, key=lambda model: (read_cost(model), model.miss_rates[REASONABLE.name] or 0)):
        rate = model.miss_rates[REASONABLE.name]
        if rate is not None and all(rate < (other.miss_rates[REASONABLE.name] or 0) for other in front):
            front.append(model)
    return front


def _list_pareto_axes(
    series: Mapping[str, Sequence[ModelResult]],
) -> list[tuple[str, Callable[[ModelResult], float | None]]]:
    """Return the costs that were measured for at least one model."""
    models = [model for models in series.values() for model in models]
    return [(label, read) for label, read in PARETO_AXES if any(read(model) is not None for model in models)]


def _get_pareto_size(series: Mapping[str, Sequence[ModelResult]]) -> tuple[float, float]:
    """Return width and height of the figure in inches: two panels in each row."""
    num_rows = -(-len(_list_pareto_axes(series)) // 2)
    return PARETO_SIZE_INCH[0], PARETO_SIZE_INCH[1] * num_rows


def plot_pareto(series: Mapping[str, Sequence[ModelResult]]) -> str:
    """Plot miss rate against latency, memory and, where it was measured, energy as inline SVG.

    Args:
        series: Models of each result, by its name.

    Returns:
        Inline SVG, or an empty string if no miss rate was measured.
    """
    measured = [
        model for models in series.values() for model in models if model.miss_rates[REASONABLE.name] is not None
    ]
    if not measured:
        return ""
    descriptions = [f"{model.name} {format_percent(model.miss_rates[REASONABLE.name])}" for model in measured]
    title = "Miss rate against latency and memory"
    size_inch = _get_pareto_size(series)
    return _render_figure(lambda figure: _draw_pareto(figure, series), title, descriptions, size_inch)


def write_pareto_plot(path: Path, series: Mapping[str, Sequence[ModelResult]]) -> None:
    """Plot miss rate against latency, memory and energy; the file is replaced atomically.

    Args:
        path: Output file; its suffix is one of `PLOT_SUFFIXES`.
        series: Models of each result, by its name.

    Raises:
        DataError: No miss rate was measured.
    """
    if not plot_pareto(series):
        raise DataError(f"--plot {path}: the results contain no miss rate. Measure with --data.")
    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=_get_pareto_size(series), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_pareto(figure, series)
        with atomic_write(path) as temp_path:
            figure.savefig(temp_path, dpi=150, format=path.suffix[1:])


def _draw_pareto(figure: Figure, series: Mapping[str, Sequence[ModelResult]]) -> None:
    """Draw one panel per cost: one color per result, intervals as vertical lines, and a line along the Pareto front."""
    costs_axes = _list_pareto_axes(series)
    num_rows = -(-len(costs_axes) // 2)
    panels = figure.subplots(num_rows, 2, sharey=True, squeeze=False).ravel()
    for axes in panels[len(costs_axes) :]:
        axes.set_axis_off()
    for axes, (label, read_cost) in zip(panels, costs_axes, strict=False):
        for index, (name, models) in enumerate(series.items()):
            style = _get_line_style(index)
            front = find_pareto_front(models, read_cost)
            rates = [100 * (model.miss_rates[REASONABLE.name] or 0) for model in front]
            axes.plot([read_cost(model) or 0 for model in front], rates, alpha=0.6, **style)
            for model in models:
                rate, interval = model.miss_rates[REASONABLE.name], model.accuracy[0].intervals.get(REASONABLE.name)
                x = read_cost(model)
                if rate is None or x is None:
                    continue
                y = 100 * rate
                if interval:
                    ends = 100 * interval.ci_low, 100 * interval.ci_high
                    axes.plot((x, x), ends, color=style["color"], alpha=0.35, linewidth=3, solid_capstyle="butt")
                axes.plot(x, y, MARKERS[index % len(MARKERS)], color=style["color"], markersize=7)
                axes.annotate(model.name, (x, y), (6, 4), textcoords="offset points", fontsize=8)
            axes.plot([], [], marker=MARKERS[index % len(MARKERS)], label=name, **style)
        costs = [cost for models in series.values() for model in models if (cost := read_cost(model)) is not None]
        if max(costs) > 4 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(format_2_or_5))
        axes.margins(x=0.15)
        axes.set(xlabel=label)
    panels[0].autoscale_view(scalex=False)  # the panels share this axis
    panels[0].set_ylim(0, 1.03 * panels[0].get_ylim()[1])
    for axes in panels[::2]:
        axes.set(ylabel="MR^-2 Reasonable, %")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def _get_line_style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def format_percent(fraction: float | None) -> str:
    """Format a miss rate in percent; "-" for None.

    Args:
        fraction: Miss rate, 0 to 1, or None.

    Returns:
        For example "12.34 %".
    """
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def format_2_or_5(value: float, _: object) -> str:
    """Format a tick of a logarithmic axis if its first digit is 2 or 5; otherwise return an empty string.

    Args:
        value: Position of the tick.
    """
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _compute_stage_means(model: ModelResult) -> tuple[float, float, float]:
    stages = model.stages
    return (
        float(np.mean(stages.preprocess_ms)),
        float(np.mean(stages.inference_ms)),
        float(np.mean(stages.postprocess_ms)),
    )


def render_svg(
    draw: Callable[[Axes], None], title: str, descriptions: Sequence[str], height_inch: float = FIGURE_SIZE_INCH[1]
) -> str:
    """Render a plot as inline SVG.

    Args:
        draw: Function that draws on the axes.
        title: Title of the text alternative; unique on the page.
        descriptions: Contents of the text alternative.
        height_inch: Height of the figure.

    Returns:
        Inline SVG.
    """
    size_inch = FIGURE_SIZE_INCH[0], height_inch
    return _render_figure(lambda figure: draw(figure.subplots()), title, descriptions, size_inch)


def _render_figure(
    draw: Callable[[Figure], None], title: str, descriptions: Sequence[str], size_inch: tuple[float, float]
) -> str:
    with mpl.rc_context({**mpl.rcParamsDefault, **RC_PARAMS, "backend": "agg"}):
        figure = Figure(figsize=size_inch, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _embed_svg(buffer.getvalue(), title, f"{title}: {'; '.join(descriptions)}")


def _embed_svg(svg: str, title: str, label: str) -> str:
    """Prepare an SVG for HTML: remove prolog, namespaces and metadata, make ids unique, use the colors of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = f'<svg {view_box[0]} role="img" aria-label="{html.escape(label)}">' + svg[svg.index(">") + 1 :]
    return svg.replace(TEXT_COLOR, "currentColor").replace(GRID_COLOR, "var(--grid)")


def write_miss_rate_plot(path: Path, scores: Mapping[str, ScoreResult]) -> None:
    """Plot the miss-rate curves of detection files, one panel per setup; the file is replaced atomically.

    Args:
        path: Output file; its suffix is one of `PLOT_SUFFIXES`.
        scores: Result of each detection file, by its name. Setups without ground truth are omitted.
    """
    first = next(iter(scores.values()))
    setups = [name for name, rate in first.miss_rates.items() if rate.num_gt] or list(first.miss_rates)
    columns = min(MAX_COLUMNS, len(setups))
    rows = -(-len(setups) // columns)
    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(FIGURE_SIZE_INCH[0] * columns, FIGURE_SIZE_INCH[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for index, setup in enumerate(setups):
            axes = figure.add_subplot(rows, columns, index + 1)
            rates = {name: score.miss_rates[setup] for name, score in scores.items()}
            lines = [
                (f"{format_percent(rate.value)}  {name}", rate.fppi, rate.miss_rate) for name, rate in rates.items()
            ]
            draw_miss_rates(axes, lines, band_color="0.85")
            axes.set_title(f"{setup}, {first.miss_rates[setup].num_gt:,} boxes")
        with atomic_write(path) as temp_path:
            figure.savefig(temp_path, dpi=150)
