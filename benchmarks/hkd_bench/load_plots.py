"""Plots of load: `hkd-bench --sustained` over time, and the latency of `hkd-bench --cameras`."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hkd_bench.plots import COLORS, GRID_COLOR, LINE_STYLES, MARKERS, render_svg
from hkd_bench.result import BenchResult
from hkd_bench.sustained import SustainedPart, SustainedResult

PLOT_HEIGHT_INCH = 2.6
# Title, axis label, and function that reads the value.
QUANTITIES: tuple[tuple[str, str, Callable[[SustainedPart], float | None]], ...] = (
    ("CPU clock", "MHz", lambda part: part.cpu_mhz),
    ("GPU clock", "MHz", lambda part: part.gpu_mhz),
    ("Highest temperature", "°C", lambda part: part.temperature_c),
    ("Power", "W", lambda part: part.watts),
)


def plot_sustained(result: BenchResult) -> list[tuple[str, str]]:
    """Plot each quantity that was measured over time.

    Args:
        result: Measurements of all models.

    Returns:
        Title and inline SVG of each plot; none without sustained runs.
    """
    runs = [(model.name, model.sustained) for model in result.models if model.sustained]
    if not runs:
        return []
    descriptions = [
        f"{name} {run.first.p50_ms:.1f} ms at the start, {run.last.p50_ms:.1f} ms at the end" for name, run in runs
    ]
    title = "Latency over time"
    svg = render_svg(lambda axes: _draw_latency(axes, runs), title, descriptions, PLOT_HEIGHT_INCH)
    plots = [(title, svg)]
    for name, unit, read in QUANTITIES:
        if any(read(point) is not None for _, run in runs for point in run.points):
            title = f"{name} over time"
            plots.append((title, _plot_quantity(runs, title, unit, read)))
    return plots


def _draw_latency(axes: Axes, runs: Sequence[tuple[str, SustainedResult]]) -> None:
    """Draw p50 as lines and the range up to p99 as bands; the last tenth is shaded."""
    for index, (name, run) in enumerate(runs):
        color, minutes = COLORS[index % len(COLORS)], _get_minutes(run)
        p50, p99 = [point.p50_ms for point in run.points], [point.p99_ms for point in run.points]
        axes.plot(minutes, p50, color=color, linestyle=LINE_STYLES[index % len(LINE_STYLES)], label=name)
        axes.fill_between(minutes, p50, p99, color=color, alpha=0.2, linewidth=0)
    longest = max((run for _, run in runs), key=lambda run: run.seconds)
    axes.axvspan(longest.last.start_s / 60, longest.seconds / 60, color=COLORS[0], alpha=0.08, linewidth=0)
    axes.set(xlabel="time, min", ylabel="latency, ms")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))


def _plot_quantity(
    runs: Sequence[tuple[str, SustainedResult]],
    title: str,
    unit: str,
    read: Callable[[SustainedPart], float | None],
) -> str:
    def draw(axes: Axes) -> None:
        for index, (name, run) in enumerate(runs):
            pairs = zip(_get_minutes(run), map(read, run.points), strict=True)
            points = [(minutes, value) for minutes, value in pairs if value is not None]
            axes.plot(
                [minutes for minutes, _ in points],
                [value for _, value in points],
                color=COLORS[index % len(COLORS)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                label=name,
            )
        axes.set(xlabel="time, min", ylabel=unit)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))

    return render_svg(draw, title, [name for name, _ in runs], PLOT_HEIGHT_INCH)


def plot_cameras(result: BenchResult) -> str:
    """Plot p50 and p99 of the response time against the number of cameras, with the period as limit.

    Args:
        result: Measurements of all models.

    Returns:
        Inline SVG, or an empty string if the number of cameras was not searched.
    """
    found = [(model.name, model.cameras) for model in result.models if model.cameras]
    if not found:
        return ""
    period_ms = 1e3 / found[0][1].fps

    def draw(axes: Axes) -> None:
        for index, (name, cameras) in enumerate(found):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            p99 = [(point.cameras, point.p99_ms) for point in cameras.points if point.p99_ms is not None]
            p50 = [(point.cameras, point.p50_ms) for point in cameras.points if point.p50_ms is not None]
            for points, line, label in ((p99, "-", name), (p50, ":", None)):
                counts, times_ms = [one[0] for one in points], [one[1] for one in points]
                axes.plot(counts, times_ms, linestyle=line, label=label, color=color, marker=marker, markersize=5)
        axes.axhline(period_ms, color=GRID_COLOR, linewidth=1.5)
        axes.set(xlabel="cameras", ylabel="time to boxes, ms")
        axes.set_ylim(0, 1.6 * period_ms)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))

    descriptions = [f"{name} holds {cameras.cameras}" for name, cameras in found]
    return render_svg(draw, "Time to boxes against the number of cameras", descriptions, PLOT_HEIGHT_INCH)


def _get_minutes(run: SustainedResult) -> list[float]:
    return [(point.start_s + point.seconds / 2) / 60 for point in run.points]
