"""The distillation study's table, JSON and plot, from what its runs left."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distillation_plan import DATA, ROWS, Budget, Row
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.host import read_host_fields
from hkd_bench.result import BenchResult
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.export.options import ExportOptions
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import atomic_write, write_text
from hkd_det.models.checkpoint import load_detector_checkpoint

SETUP = "Reasonable"
STEP = 1.06  # between neighbours of the same FLOPs in the plot
VERIFIED = 8  # pictures on which an exported file is compared with torch


@dataclass(frozen=True)
class Line:
    """One row of the table: what its seeds gave. latency_ms: p50 from frame to detections, of the first seed's file."""

    row: Row
    seeds: list[dict[str, Any]]
    latency_ms: float

    def of(self, *keys: str) -> list[float]:
        """A figure of every seed."""
        found = []
        for one in self.seeds:
            value: Any = one
            for key in keys:
                value = value[key]
            found.append(value)
        return found

    def mean(self, *keys: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.of(*keys))


def write_report(budget: Budget, runs: Path, results: Path, also: Path | None = None) -> None:
    """Write `distillation_BUDGET.md`, `.json` and `.png` of all finished runs.

    also: the JSON of an earlier report, whose other seeds are taken over in the rows that are there.
    """
    earlier = json.loads(also.read_text(encoding="utf-8"))["rows"] if also else []
    others = {one["row"]["name"]: one["seeds"] for one in earlier}
    finished = [(row, seeds) for row in ROWS if (seeds := _seeds(runs, row))]
    measured = measure_latency(budget, runs, [(row, seeds[0]) for row, seeds in finished])
    latency = {model.name: model.latency.p50_ms for model in measured.models}
    lines = [Line(row, _with(seeds, others.get(row.name, [])), latency[row.name]) for row, seeds in finished]
    stem = results / f"distillation_{budget.name}"
    content = {
        "budget": asdict(budget),
        "host": [asdict(fact) for fact in read_host_fields()],
        "rows": [{"row": asdict(line.row), "latency_p50_ms": line.latency_ms, "seeds": line.seeds} for line in lines],
    }
    write_text(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), page(budget, lines))
    with atomic_write(stem.with_suffix(".png")) as aside:
        plot(lines).savefig(aside, dpi=120, format="png")


def _seeds(runs: Path, row: Row) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(runs.glob(f"seed*/{row.name}/judged.json"))]


def _with(seeds: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds and those others that are not among them, in order."""
    known = {one["seed"] for one in seeds}
    return sorted([*seeds, *(one for one in others if one["seed"] not in known)], key=lambda one: one["seed"])


def measure_latency(budget: Budget, runs: Path, rows: Sequence[tuple[Row, dict[str, Any]]]) -> BenchResult:
    """Every row's exported file on the CPU, in turn, in one run."""
    samples = load_dataset(str(DATA), "test")
    files = []
    for row, first in rows:
        file = runs / f"{row.name}.onnx"
        checkpoint = load_detector_checkpoint(runs / f"seed{first['seed']}" / row.name / "best.pt")
        export_detector(
            checkpoint, file, ExportOptions(budget.imgsz_hw), [sample.path for sample in samples[:VERIFIED]]
        )
        files.append(file)
    return bench(files, samples, BenchOptions(data=str(DATA), split="test"), [row.name for row, _ in rows])


def page(budget: Budget, lines: Sequence[Line]) -> str:
    """Markdown: the table, the miss rates by height, and the published claims beside ours."""
    seeds = sorted({one["seed"] for line in lines for one in line.seeds})
    height, width = budget.imgsz_hw
    told = claims({line.row.name: line for line in lines})
    return "\n".join(
        [
            f"# What each way of teaching is worth: budget {budget.name}",
            "",
            f"`python benchmarks/studies/distillation.py --budget {budget.name}`, seeds {', '.join(map(str, seeds))}; "
            f"{budget.teacher} ({budget.teacher_epochs} epochs) teaches {budget.student} ({budget.epochs}) at "
            f"{width}x{height}. MR^-2 {SETUP} of "
            "CityPersons' protocol on INRIA's 288 test pictures: mean over the seeds, in brackets least and most. CPU "
            "p50 is from a picture to its detections, of the first seed's exported file, all files in turn in one run. "
            "CDD and blockwise begin as the trained teacher, so their control is the teacher that is trained on.",
            "",
            *table(lines),
            "",
            "MR^-2 by height of the person in the picture, means over the seeds:",
            "",
            *by_height(lines),
            "",
            *(["## The published claims beside ours", "", *told, ""] if told else []),
        ]
    )


def table(lines: Sequence[Line]) -> list[str]:
    """The main table."""
    head = ["", "seeds", "MR^-2", "AP", "parameters", "GFLOPs", "CPU p50", "training", "energy"]
    rows = []
    for line in lines:
        rates = [100 * rate for rate in line.of("miss_rates", SETUP)]
        joules = [one["energy"]["joules"] for one in line.seeds]
        rows.append(
            [
                line.row.title,
                str(len(line.seeds)),
                f"{statistics.fmean(rates):.1f} % ({min(rates):.1f}-{max(rates):.1f})",
                f"{100 * line.mean('ap'):.1f} %",
                f"{line.mean('parameters') / 1e6:.2f} M",
                f"{line.mean('flops') / 1e9:.2f}",
                f"{line.latency_ms:.2f} ms",
                f"{line.mean('train_s') / 60:.1f} min",
                "not readable" if None in joules else f"{statistics.fmean(joules) / 1000:.1f} kJ",
            ]
        )
    return markdown(head, rows)


def by_height(lines: Sequence[Line]) -> list[str]:
    """Miss rates of the setups in which somebody is to be found."""
    people = lines[0].seeds[0]["people"]
    names = [name for name, count in people.items() if count]
    rows = [[line.row.title, *(f"{100 * line.mean('miss_rates', name):.1f} %" for name in names)] for line in lines]
    return markdown(["", *(f"{name} ({people[name]})" for name in names)], rows)


def claims(lines: dict[str, Line]) -> list[str]:
    """One line a claim, of the rows that are there."""

    def rate(name: str) -> str:
        return f"{100 * lines[name].mean('miss_rates', SETUP):.1f} %"

    def share(name: str, what: str) -> str:
        return f"{100 * (lines[name].mean(what) / lines['teacher'].mean(what) - 1):+.0f} %"

    told = []
    again = f", {rate('again')} when it is trained on for as long" if "again" in lines else ""
    if {"teacher", "alone", "hkd"} <= lines.keys():
        fewer = lines["teacher"].mean("parameters") / lines["hkd"].mean("parameters")
        told.append(
            f"- HKD: 6x fewer parameters at a competitive miss rate. Ours: {fewer:.1f}x fewer; teacher "
            f"{rate('teacher')}, student taught {rate('hkd')}, alone {rate('alone')}."
        )
    if {"teacher", "cdd"} <= lines.keys():
        told.append(
            "- CDD: parameters -67 %, FLOPs -66 % at no loss. Ours: "
            f"{share('cdd', 'parameters')}, {share('cdd', 'flops')}; {rate('cdd')} against the teacher's "
            f"{rate('teacher')}{again}."
        )
    if {"teacher", "blockwise"} <= lines.keys():
        told.append(
            "- Blockwise: 3x to 3.9x faster on four workers with 19-29 % less energy. Ours: times and energy in "
            f"results/blockwise.md; parameters {share('blockwise', 'parameters')}, "
            f"FLOPs {share('blockwise', 'flops')}, {rate('blockwise')} after fine-tuning, against the teacher's "
            f"{rate('teacher')}{again}."
        )
    if {"alone", "mokd"} <= lines.keys():
        told.append(f"- MoKD: fewer epochs for the same result. Ours: {epochs_needed(lines)}")
    if {"alone", "noise"} <= lines.keys():
        told.append(f"- Noisy teacher: a better shallow student. Ours: {rate('noise')} against {rate('alone')} alone.")
    return told


def epochs_needed(lines: dict[str, Line]) -> str:
    """After how many epochs each taught student had the validation miss rate that the student alone ended with."""
    told = []
    for name in ("hkd", "mokd", "best"):
        if name not in lines:
            continue
        needed = []
        alone_by_seed = {one["seed"]: one for one in lines["alone"].seeds}
        for taught in lines[name].seeds:
            if taught["seed"] not in alone_by_seed:
                continue
            alone = alone_by_seed[taught["seed"]]
            reached = [epoch for epoch, rate in enumerate(taught["course"], 1) if rate <= min(alone["course"])]
            needed.append(str(reached[0]) if reached else "never")
        told.append(f"{lines[name].row.title} after {', '.join(needed)}")
    epochs = len(lines["alone"].seeds[0]["course"])
    return (
        f"the best validation miss rate of the student alone in {epochs} epochs was reached by " + "; ".join(told) + "."
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def plot(lines: Sequence[Line]) -> Figure:
    """Miss rate against FLOPs; bars from the least to the most of the seeds, rows of the same FLOPs side by side."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    beside: Counter[float] = Counter()
    for index, (line, colour) in enumerate(zip(lines, colours, strict=False)):
        rates = [100 * rate for rate in line.of("miss_rates", SETUP)]
        mean = statistics.fmean(rates)
        spread = [[mean - min(rates)], [max(rates) - mean]]
        flops = line.mean("flops") / 1e9
        x = flops * STEP ** beside[flops]
        beside[flops] += 1
        label = f"{mean:.1f} %  {line.row.title}"
        axes.errorbar([x], [mean], yerr=spread, fmt="o", capsize=3, color=colour, label=label)
        below = -10 if index % 2 else 4  # neighbours' names apart
        axes.annotate(line.row.name, (x, mean), textcoords="offset points", xytext=(4, below), fontsize=7)
    axes.set_xlabel("GFLOPs a picture (rows of the same FLOPs stand side by side, the first at its place)")
    axes.set_ylabel("MR$^{-2}$ Reasonable, %")
    low, high = axes.get_xlim()
    rounded = [part * 10**power for power in range(-2, 3) for part in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in rounded if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
