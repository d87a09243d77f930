"""The report's figures, as inline SVG: text stays text, ink follows the page's colour, light or dark.

Miss rate against false positives per picture, as the papers draw it: both axes logarithmic, a panel a setup.
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
from hkd_det.files import atomic_write
from hkd_det.metrics.citypersons import FPPI_POINTS, REASONABLE

# Okabe and Ito's palette (2008), told apart by the colour-blind, less what vanishes on white or on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # and by shape, in print


TEXT_COLOR, GRID_COLOR = "#010203", "#040506"  # stand for the page's own colours, put in afterwards


RC_PARAMS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a file may be called a$b$
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


FIGURE_SIZE_INCH = (5.4, 3.7)  # 389 points wide: letters stay readable on a phone of that many pixels


MISS_RATE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.64, 0.8, 1.0)


def plot_miss_rate(result: BenchResult, setup: str = REASONABLE.name) -> str:
    """Miss rate against false positives per picture, both logarithmic, as the papers draw it; MR^-2 in the legend.

    setup: Reasonable or All. Empty where no curve was measured.
    """
    curves = [model.curve if setup == REASONABLE.name else model.curve_all for model in result.models]
    if not any(model.num_gt[setup] for model in result.models) or None in curves:
        return ""

    def draw(axes: Axes) -> None:
        lines = [
            (
                f"{format_percent(model.miss_rates[setup])}  {model.name}",
                np.array(curve.fppi),
                np.array(curve.miss_rate),
            )
            for model, curve in zip(result.models, curves, strict=True)
            if curve is not None
        ]
        draw_miss_rates(axes, lines)

    told = [f"{model.name} {format_percent(model.miss_rates[setup])}" for model in result.models]
    return _render_svg(draw, f"Miss rate against false positives per picture, {setup}", told)


def draw_miss_rates(
    axes: Axes, lines: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]], band_color: str = GRID_COLOR
) -> None:
    """Lines of (label, FPPI [D], miss rate [D]) on logarithmic axes; the range that is averaged is shaded."""
    lowest = 1.0
    for number, (label, behind, missed_behind) in enumerate(lines):
        fppi, missed = np.array([0.0, *behind]), np.array([1.0, *missed_behind])
        axes.plot(
            np.maximum(fppi, 1e-6), np.maximum(missed, 1e-6), drawstyle="steps-post", label=label, **_line_style(number)
        )
        shown = missed[fppi <= 10]
        lowest = min(lowest, float(shown[shown > 0].min(initial=1.0)))
    floor = max((tick for tick in MISS_RATE_TICKS if tick < lowest), default=MISS_RATE_TICKS[0])
    axes.set(xscale="log", yscale="log", xlim=(10**-2.5, 10), ylim=(min(floor, 0.5), 1.03))
    axes.axvspan(FPPI_POINTS[0], FPPI_POINTS[-1], color=band_color, alpha=0.35, linewidth=0)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in MISS_RATE_TICKS if tick >= min(floor, 0.5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="false positives per picture", ylabel="miss rate")
    axes.legend(loc="lower left")


def plot_latency(result: BenchResult) -> str:
    """The share of runs that were done within a time; p50, p90 and p99 as dots."""

    def draw(axes: Axes) -> None:
        for number, model in enumerate(result.models):
            times, latency = np.sort(model.e2e_ms), model.latency
            share = np.arange(1, len(times) + 1) / len(times)
            style = _line_style(number)
            axes.plot(times, share, drawstyle="steps-post", label=f"p50 {latency.p50_ms:.1f} ms  {model.name}", **style)
            marks = [latency.p50_ms, latency.p90_ms, latency.p99_ms]
            axes.plot(marks, (0.5, 0.9, 0.99), "o", color=style["color"], markersize=4.5)
        everything = np.concatenate([model.e2e_ms for model in result.models])
        if everything.max() > 6 * everything.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(_format_2_or_5))
        else:
            axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 0.9, 0.99]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"p{100 * value:.0f}" if value else "0"))
        axes.set(xlabel="milliseconds, frame to boxes", ylabel="share of runs", ylim=(0, 1.02))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))  # inside it would lie on someone's curve

    return _render_svg(
        draw, "Latency distribution", [f"{model.name} p50 {model.latency.p50_ms:.1f} ms" for model in result.models]
    )


def plot_stages(result: BenchResult) -> str:
    """Where the time goes: mean milliseconds a stage."""
    names = ("letterbox", "network", "boxes back")
    means = np.array([_compute_stage_means(model) for model in result.models])  # [models, 3]
    texts = [" + ".join(f"{part:.2g}" if part < 1 else f"{part:.1f}" for part in split) + " ms" for split in means]

    def draw(axes: Axes) -> None:
        rows = np.arange(len(means))
        left = np.zeros(len(rows))
        for number, name in enumerate(names):
            axes.barh(rows, means[:, number], left=left, height=0.55, color=COLORS[number], label=name)
            left += means[:, number]
        for row, text in zip(rows, texts, strict=True):
            axes.text(0, row - 0.32, text, va="bottom", fontsize=8.5)
        axes.set_yticks(rows, [model.name for model in result.models])
        axes.set_ylim(len(rows) - 0.6, -0.8)  # the first at the top, with room for its text
        axes.grid(False, axis="y")
        axes.set(xlabel="milliseconds, mean")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)

    told = [f"{model.name} {text}" for model, text in zip(result.models, texts, strict=True)]
    return _render_svg(draw, "Time of each stage", told, height_inch=1.5 + 0.6 * len(result.models))


def plot_training(training: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Validation miss rate (fraction) after each epoch of each training; the best as a dot."""

    def draw(axes: Axes) -> None:
        for number, (name, history) in enumerate(training.items()):
            epochs, missed = np.array([epoch for epoch, _ in history]), np.array([100 * value for _, value in history])
            style = _line_style(number)
            axes.plot(epochs, missed, label=f"{np.nanmin(missed):.2f} %  {name}", **style)
            best = int(np.nanargmin(missed))
            axes.plot(epochs[best], missed[best], "o", color=style["color"], markersize=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="MR^-2 Reasonable, %")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left", title="best epoch")

    told = [
        f"{name} best {100 * np.nanmin([value for _, value in history]):.2f} %" for name, history in training.items()
    ]
    return _render_svg(draw, "Miss rate during training", told)


def _line_style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def format_percent(fraction: float | None) -> str:
    """A miss rate as it is printed everywhere."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def _format_2_or_5(value: float, _: object) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _compute_stage_means(model: ModelResult) -> tuple[float, float, float]:
    stages = model.stages
    return (
        float(np.mean(stages.preprocess_ms)),
        float(np.mean(stages.inference_ms)),
        float(np.mean(stages.postprocess_ms)),
    )


def _render_svg(
    draw: Callable[[Axes], None], title: str, descriptions: Sequence[str], height_inch: float = FIGURE_SIZE_INCH[1]
) -> str:
    """One figure as inline SVG. told: what it shows, in words, for who cannot see it."""
    with mpl.rc_context({**mpl.rcParamsDefault, **RC_PARAMS, "backend": "agg"}):
        figure = Figure(figsize=(FIGURE_SIZE_INCH[0], height_inch), layout="constrained")
        draw(figure.subplots())
        packed = io.StringIO()
        figure.savefig(packed, format="svg", transparent=True)
    return _embed_svg(packed.getvalue(), title, f"{title}: {'; '.join(descriptions)}")


def _embed_svg(svg: str, title: str, label: str) -> str:
    """Without prolog, namespaces and metadata, which HTML does not want; ids of its own; the page's own colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{own}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    svg = f'<svg {size[0]} role="img" aria-label="{html.escape(label)}">' + svg[svg.index(">") + 1 :]
    return svg.replace(TEXT_COLOR, "currentColor").replace(GRID_COLOR, "var(--grid)")


PLOT_SUFFIXES = (".svg", ".png", ".pdf")


MAX_COLUMNS = 3


def write_miss_rate_plot(path: Path, scores: Mapping[str, ScoreResult]) -> None:
    """Write the plot in one step; setups with nobody in them are left out."""
    first = next(iter(scores.values()))
    setups = [name for name, rate in first.miss_rates.items() if rate.num_gt] or list(first.miss_rates)
    columns = min(MAX_COLUMNS, len(setups))
    rows = -(-len(setups) // columns)
    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(FIGURE_SIZE_INCH[0] * columns, FIGURE_SIZE_INCH[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for number, setup in enumerate(setups):
            axes = figure.add_subplot(rows, columns, number + 1)
            rates = {name: one.miss_rates[setup] for name, one in scores.items()}
            lines = [
                (f"{format_percent(rate.value)}  {name}", rate.fppi, rate.miss_rate) for name, rate in rates.items()
            ]
            draw_miss_rates(axes, lines, band_color="0.85")
            axes.set_title(f"{setup}, {first.miss_rates[setup].num_gt:,} people")
        with atomic_write(path) as aside:
            figure.savefig(aside, dpi=150)
