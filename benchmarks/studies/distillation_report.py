"""Report of the distillation study: table, JSON and plot of all finished runs."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distillation_plan import ROWS, Budget, Row
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.host import read_host_fields
from hkd_bench.result import BenchResult
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.console import format_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import atomic_write, write_text
from hkd_det.models.checkpoint import load_detector_checkpoint

SETUP = "Reasonable"
STEP = 1.06  # distance in the plot between rows with the same FLOPs, as a factor
NUM_PARITY_IMAGES = 8  # images on which an exported file is compared with torch


@dataclass(frozen=True)
class RowResult:
    """Results of one row.

    Attributes:
        row: The row.
        seeds: Content of `result.json` of each seed.
        latency_ms: Median latency from frame to detections of the first seed's exported file.
    """

    row: Row
    seeds: list[dict[str, Any]]
    latency_ms: float

    def get(self, *keys: str) -> list[float]:
        """Return one value of every seed, addressed by nested keys."""
        values = []
        for seed in self.seeds:
            value: Any = seed
            for key in keys:
                value = value[key]
            values.append(value)
        return values

    def mean(self, *keys: str) -> float:
        """Return the mean of a value over the seeds."""
        return statistics.fmean(self.get(*keys))


def write_report(budget: Budget, data: Path, runs: Path, results: Path, merge: Path | None = None) -> None:
    """Write `distillation_BUDGET.md`, `.json` and `.png` of all finished runs.

    Args:
        budget: Models and schedule.
        data: Data YAML.
        runs: Directory of the seeds.
        results: Directory of the report.
        merge: JSON of another report; its missing seeds are added to the finished rows.
    """
    merged_rows = json.loads(merge.read_text(encoding="utf-8"))["rows"] if merge else []
    merged_seeds = {entry["row"]["name"]: entry["seeds"] for entry in merged_rows}
    finished = [(row, seeds) for row in ROWS if (seeds := _read_seeds(runs, row))]
    bench_result = measure_latency(budget, data, runs, [(row, seeds[0]) for row, seeds in finished])
    latency = {model.name: model.latency.p50_ms for model in bench_result.models}
    rows = [
        RowResult(row, _merge_seeds(seeds, merged_seeds.get(row.name, [])), latency[row.name])
        for row, seeds in finished
    ]
    stem = results / f"distillation_{budget.name}"
    content = {
        "budget": asdict(budget),
        "host": [asdict(field) for field in read_host_fields()],
        "rows": [{"row": asdict(row.row), "latency_p50_ms": row.latency_ms, "seeds": row.seeds} for row in rows],
    }
    write_text(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), format_page(budget, rows))
    with atomic_write(stem.with_suffix(".png")) as temp_path:
        plot(rows).savefig(temp_path, dpi=120, format="png")


def measure_latency(budget: Budget, data: Path, runs: Path, rows: Sequence[tuple[Row, dict[str, Any]]]) -> BenchResult:
    """Export the first seed of every row and measure all files alternately on the CPU.

    Args:
        budget: Models and schedule.
        data: Data YAML.
        runs: Directory of the seeds.
        rows: Rows with the result of their first seed.

    Returns:
        The benchmark result, one model per row.
    """
    samples = load_dataset(str(data), "test")
    parity_images = [sample.path for sample in samples[:NUM_PARITY_IMAGES]]
    files = []
    for row, first_seed in rows:
        file = runs / f"{row.name}.onnx"
        checkpoint = load_detector_checkpoint(runs / f"seed{first_seed['seed']}" / row.name / "best.pt")
        export_detector(checkpoint, file, ExportOptions(budget.imgsz_hw), parity_images)
        files.append(file)
    return bench(files, samples, BenchOptions(data=str(data), split="test"), [row.name for row, _ in rows])


def format_page(budget: Budget, rows: Sequence[RowResult]) -> str:
    """Return the Markdown page: the table, the miss rates by height, and the published claims.

    Args:
        budget: Models and schedule.
        rows: The results.
    """
    seeds = sorted({seed["seed"] for row in rows for seed in row.seeds})
    height, width = budget.imgsz_hw
    claims = list_claims({row.row.name: row for row in rows})
    return "\n".join(
        [
            f"# Distillation methods compared: budget {budget.name}",
            "",
            f"Miss rate, size, CPU latency and training time of {budget.teacher} ({budget.teacher_epochs} epochs), "
            f"{budget.student} ({budget.epochs} epochs) and every distillation method at {width}x{height}.",
            "",
            "```bash",
            f"python benchmarks/studies/distillation.py --data DATA.yaml --budget {budget.name} "
            f"--seeds {','.join(map(str, seeds))}",
            "```",
            "",
            f"MR^-2 {SETUP} is CityPersons' protocol on INRIA's 288 test images: mean over the seeds, minimum and "
            "maximum in brackets. CPU p50 is the median latency from an image to its detections of the first seed's "
            "exported file; all files were measured alternately. CDD and blockwise start from the trained teacher. "
            "Compare them with the teacher that is fine-tuned for the same number of epochs.",
            "",
            format_results(rows),
            "",
            "MR^-2 by height of the person in the image, means over the seeds (number of persons in brackets):",
            "",
            format_heights(rows),
            "",
            *(["## Comparison with published claims", "", *claims, ""] if claims else []),
        ]
    )


def format_results(rows: Sequence[RowResult]) -> str:
    """Return the main table.

    Args:
        rows: The results.
    """
    head = ["", "seeds", "MR^-2", "AP", "parameters", "GFLOPs", "CPU p50", "training", "energy"]
    cells = []
    for row in rows:
        rates = [100 * rate for rate in row.get("miss_rates", SETUP)]
        joules = [seed["energy"]["joules"] for seed in row.seeds]
        cells.append(
            [
                row.row.title,
                str(len(row.seeds)),
                f"{statistics.fmean(rates):.1f} % ({min(rates):.1f}-{max(rates):.1f})",
                f"{100 * row.mean('ap'):.1f} %",
                f"{row.mean('parameters') / 1e6:.2f} M",
                f"{row.mean('flops') / 1e9:.2f}",
                f"{row.latency_ms:.2f} ms",
                f"{row.mean('train_s') / 60:.1f} min",
                "not readable" if None in joules else f"{statistics.fmean(joules) / 1000:.1f} kJ",
            ]
        )
    return format_table(cells, head, style="github")


def format_heights(rows: Sequence[RowResult]) -> str:
    """Return the table of miss rates in the setups that contain persons.

    Args:
        rows: The results.
    """
    num_gt = rows[0].seeds[0]["num_gt"]
    names = [name for name, count in num_gt.items() if count]
    cells = [[row.row.title, *(f"{100 * row.mean('miss_rates', name):.1f} %" for name in names)] for row in rows]
    return format_table(cells, ["", *(f"{name} ({num_gt[name]})" for name in names)], style="github")


def list_claims(rows: dict[str, RowResult]) -> list[str]:
    """Return one line per published claim whose rows exist.

    Args:
        rows: The results by name of the row.
    """

    def format_rate(name: str) -> str:
        return f"{100 * rows[name].mean('miss_rates', SETUP):.1f} %"

    def format_change(name: str, key: str) -> str:
        return f"{100 * (rows[name].mean(key) / rows['teacher'].mean(key) - 1):+.0f} %"

    claims = []
    fine_tuned = f" and {format_rate('teacher-long')} after the same fine-tuning" if "teacher-long" in rows else ""
    if {"teacher", "baseline", "hkd"} <= rows.keys():
        factor = rows["teacher"].mean("parameters") / rows["hkd"].mean("parameters")
        claims.append(
            f"- HKD. Published: 6x fewer parameters at a competitive miss rate. Measured: {factor:.1f}x fewer; teacher "
            f"{format_rate('teacher')}, student with HKD {format_rate('hkd')}, without teacher "
            f"{format_rate('baseline')}."
        )
    if {"teacher", "cdd"} <= rows.keys():
        claims.append(
            "- CDD. Published: parameters -67 %, FLOPs -66 %, no loss of accuracy. Measured: "
            f"{format_change('cdd', 'parameters')}, {format_change('cdd', 'flops')}; miss rate {format_rate('cdd')}, "
            f"teacher {format_rate('teacher')}{fine_tuned}."
        )
    if {"teacher", "blockwise"} <= rows.keys():
        claims.append(
            "- Blockwise. Published: 3x to 3.9x faster on four workers with 19-29 % less energy. Measured: times and "
            f"energy in [blockwise.md](blockwise.md); parameters {format_change('blockwise', 'parameters')}, FLOPs "
            f"{format_change('blockwise', 'flops')}; miss rate {format_rate('blockwise')} after fine-tuning, teacher "
            f"{format_rate('teacher')}{fine_tuned}."
        )
    if {"baseline", "mokd"} <= rows.keys():
        claims.append(f"- MoKD. Published: fewer epochs for the same result. Measured: {format_epochs(rows)}")
    if {"baseline", "noisy-teacher"} <= rows.keys():
        claims.append(
            f"- Noisy teacher. Published: a better shallow student. Measured: {format_rate('noisy-teacher')}, without "
            f"teacher {format_rate('baseline')}."
        )
    return claims


def format_epochs(rows: dict[str, RowResult]) -> str:
    """Return after how many epochs the distilled students reached the best validation miss rate of the baseline.

    Args:
        rows: The results by name of the row.
    """
    texts = []
    baseline_by_seed = {seed["seed"]: seed["val_miss_rates"] for seed in rows["baseline"].seeds}
    for name in ("hkd", "mokd", "hkd-noisy-teacher-mokd"):
        if name not in rows:
            continue
        needed = []
        for seed in rows[name].seeds:
            baseline = baseline_by_seed.get(seed["seed"])
            if baseline is None:
                continue
            reached = [epoch for epoch, rate in enumerate(seed["val_miss_rates"], 1) if rate <= min(baseline)]
            needed.append(str(reached[0]) if reached else "never")
        texts.append(f"{rows[name].row.title} after {', '.join(needed)}")
    num_epochs = len(rows["baseline"].seeds[0]["val_miss_rates"])
    return (
        f"the best validation miss rate of the student without teacher in {num_epochs} epochs was reached by "
        f"{'; '.join(texts)} epochs (one value per seed)."
    )


def plot(rows: Sequence[RowResult]) -> Figure:
    """Plot the miss rate over FLOPs with the range of the seeds. Rows with the same FLOPs are drawn side by side.

    Args:
        rows: The results.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]  # missing in the stubs
    num_drawn: Counter[float] = Counter()
    for index, (row, color) in enumerate(zip(rows, colors, strict=False)):
        rates = [100 * rate for rate in row.get("miss_rates", SETUP)]
        mean = statistics.fmean(rates)
        spread = [[mean - min(rates)], [max(rates) - mean]]
        flops = row.mean("flops") / 1e9
        x = flops * STEP ** num_drawn[flops]
        num_drawn[flops] += 1
        label = f"{mean:.1f} %  {row.row.title}"
        axes.errorbar([x], [mean], yerr=spread, fmt="o", capsize=3, color=color, label=label)
        offset = -10 if index % 2 else 4  # separates the names of neighbors
        axes.annotate(row.row.name, (x, mean), textcoords="offset points", xytext=(4, offset), fontsize=7)
    axes.set_xlabel("GFLOPs per image (rows with the same FLOPs are drawn side by side, the first at its value)")
    axes.set_ylabel("MR$^{-2}$ Reasonable, %")
    low, high = axes.get_xlim()
    rounded = [part * 10**power for power in range(-2, 3) for part in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in rounded if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _read_seeds(runs: Path, row: Row) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(runs.glob(f"seed*/{row.name}/result.json"))]


def _merge_seeds(seeds: list[dict[str, Any]], merged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {seed["seed"] for seed in seeds}
    return sorted([*seeds, *(seed for seed in merged if seed["seed"] not in known)], key=lambda seed: seed["seed"])
