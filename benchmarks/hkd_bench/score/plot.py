"""Miss rate against false positives per picture, as the papers draw it: both axes logarithmic, a panel a setup."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hkd_bench.plots import FIGURE_SIZE_INCH, draw_miss_rates, format_percent
from hkd_bench.score.judge import ScoreResult
from hkd_det.files import atomic_write

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
