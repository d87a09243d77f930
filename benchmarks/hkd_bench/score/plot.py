"""Miss rate against false positives per picture, as the papers draw it: both axes logarithmic, a panel a setup."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hkd_bench.plots import SIZE_INCH, draw_miss_rates, percent
from hkd_bench.score.judge import Score
from hkd_det.files import replacing

PLOT_SUFFIXES = (".svg", ".png", ".pdf")
COLUMNS = 3


def write_plot(path: Path, scores: Mapping[str, Score]) -> None:
    """Write the plot in one step; setups with nobody in them are left out."""
    first = next(iter(scores.values()))
    setups = [name for name, rate in first.rates.items() if rate.people] or list(first.rates)
    columns = min(COLUMNS, len(setups))
    rows = -(-len(setups) // columns)
    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(SIZE_INCH[0] * columns, SIZE_INCH[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for number, setup in enumerate(setups):
            axes = figure.add_subplot(rows, columns, number + 1)
            rates = {name: one.rates[setup] for name, one in scores.items()}
            lines = [(f"{percent(rate.value)}  {name}", rate.fppi, rate.miss_rate) for name, rate in rates.items()]
            draw_miss_rates(axes, lines, shade="0.85")
            axes.set_title(f"{setup}, {first.rates[setup].people:,} people")
        with replacing(path) as aside:
            figure.savefig(aside, dpi=150)
