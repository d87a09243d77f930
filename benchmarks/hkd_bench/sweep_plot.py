"""Plot of `hkd-bench --imgsz-sweep`: miss rate against latency, with the input size at each point."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from hkd_bench.plots import COLORS, MARKERS, format_2_or_5, format_percent, render_svg
from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.table import SHOWN_SETUPS
from hkd_det.letterbox import format_imgsz


def plot_sweep(result: BenchResult) -> str:
    """Plot the miss rate of each input size against p50, as inline SVG.

    Args:
        result: Measurements at several input sizes.

    Returns:
        Inline SVG, or an empty string if only one size or no miss rate was measured.
    """
    setup = next((name for name in SHOWN_SETUPS if result.models[0].num_gt[name]), None)
    if not result.imgsz_sweep or setup is None:
        return ""
    series: dict[str, list[ModelResult]] = {}
    for model in result.models:
        series.setdefault(model.name.rpartition("@")[0], []).append(model)

    def draw(axes: Axes) -> None:
        for index, (name, models) in enumerate(series.items()):
            _draw_series(axes, name, models, setup, index)
        costs = [cost for model in result.models for cost in (model.latency.p50_ms, model.latency.p99_ms)]
        if max(costs) > 4 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(format_2_or_5))
        axes.set(xlabel="latency from frame to boxes, ms", ylabel=f"MR^-2 {setup}, %")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))

    descriptions = [
        f"{model.name} {format_percent(model.miss_rates[setup])} at {model.latency.p50_ms:.1f} ms"
        for model in result.models
    ]
    return render_svg(draw, "Miss rate against latency at each input size", descriptions)


def _draw_series(axes: Axes, name: str, models: list[ModelResult], setup: str, index: int) -> None:
    """Draw one model: a line over its sizes, intervals of the miss rate, and lines from p50 to p99."""
    color = COLORS[index % len(COLORS)]
    p50 = [model.latency.p50_ms for model in models]
    rates = [100 * (model.miss_rates[setup] or 0) for model in models]
    axes.plot(p50, rates, color=color, marker=MARKERS[index % len(MARKERS)], markersize=6, label=name)
    for model, x, y in zip(models, p50, rates, strict=True):
        interval = model.accuracy[0].intervals[setup]
        ends = 100 * interval.ci_low, 100 * interval.ci_high
        axes.plot((x, x), ends, color=color, alpha=0.35, linewidth=3, solid_capstyle="butt")
        axes.plot((x, model.latency.p99_ms), (y, y), color=color, alpha=0.4, linewidth=1)
        height, width = model.imgsz_hw
        size = str(width) if height == width else format_imgsz(model.imgsz_hw)
        axes.annotate(size, (x, y), (4, 5), textcoords="offset points", fontsize=8)
