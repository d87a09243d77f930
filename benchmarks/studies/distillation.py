"""Compare all distillation methods: teacher, student without teacher, and the student of every method.

    python benchmarks/studies/distillation.py --data DATA.yaml --budget small [--seeds 0,1,2] [--only hkd,baseline]
    python benchmarks/studies/distillation.py --data DATA.yaml --budget medium --only baseline --student slim-student

Trains on the split `train`, selects the epoch on `val` and evaluates on `test` (see real_data.yaml). With one seed all
students start from the same weights and follow the same schedule. Finished runs are not repeated. An interrupted study
continues with the same command, also in the middle of a run. At the end all finished runs are written to
results/distillation_BUDGET.{md,json,png}.

Seeds are independent. They can be trained in parallel (OMP_NUM_THREADS=1 taskset -c 0 python ... --seeds 0) or on
several machines, and merged with --merge.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from distillation_plan import BUDGETS, ROWS, Budget, Row
from distillation_report import write_report

from hkd_bench.energy import open_energy_meter
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.train import cli
from hkd_det.train.baseline import measure_detector

RESULTS_DIR = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data YAML with the splits train, val and test")
    parser.add_argument("--budget", choices=BUDGETS, default="small", help="models and schedule (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="", help="comma-separated names of rows; the rows they need are included")
    parser.add_argument("--student", default="", help="replaces the student of the budget; written to its own report")
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="directory of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, help="directory of the report")
    parser.add_argument("--report", action="store_true", help="write the report without training")
    parser.add_argument("--merge", type=Path, help="JSON of another report; adds its seeds that are missing here")
    arguments = parser.parse_args(argv)
    budget = BUDGETS[arguments.budget]
    if arguments.student:
        budget = replace(budget, name=f"{budget.name}_{arguments.student}", student=arguments.student)
    runs = arguments.runs / budget.name
    names = {row.name for row in ROWS}
    selected = {"teacher", *arguments.only.split(",")} if arguments.only else names
    if not selected <= names:
        unknown = ", ".join(sorted(selected - names))
        parser.error(f"--only: unknown rows {unknown}. Choose from {', '.join(row.name for row in ROWS)}.")
    selected |= {name for row in ROWS if row.name in selected for name in row.same_time_as}
    if not arguments.report:
        for seed in map(int, arguments.seeds.split(",")):
            for row in ROWS:
                if row.name in selected:
                    run_row(budget, row, arguments.data, seed, runs / f"seed{seed}")
    write_report(budget, arguments.data, runs, arguments.results, arguments.merge)


def run_row(budget: Budget, row: Row, data: Path, seed: int, folder: Path) -> None:
    """Train and evaluate one student, or continue; a finished row is skipped.

    Args:
        budget: Models and schedule.
        row: The row.
        data: Data YAML.
        seed: Seed of the run.
        folder: Directory of the runs of this seed.
    """
    run_dir, result_path = folder / row.name, folder / row.name / "result.json"
    if result_path.exists():
        return
    print(f"\n== seed {seed}: {row.title}", flush=True)
    epochs = compute_epochs(budget, row, folder)
    recipe = row.make_recipe(budget, data, seed, run_dir, folder / "teacher/best.pt", epochs)
    with open_energy_meter("cpu", None) as meter:
        train(recipe, run_dir)
    joules, reason = meter.compute_total()
    checkpoint = load_detector_checkpoint(run_dir / "best.pt")
    detector = checkpoint.build()
    result, _ = measure_detector(detector, load_dataset(str(data), "test"), budget.imgsz_hw)
    content = {
        "row": row.name,
        "seed": seed,
        "recipe": recipe,
        **asdict(result),
        "best_epoch": checkpoint.epoch,
        "val_miss_rates": read_miss_rates(run_dir),
        "train_s": compute_train_seconds(recipe, run_dir),
        "energy": {"joules": joules, "reason": reason},
    }
    write_text(result_path, json.dumps(content, indent=1) + "\n")


def train(recipe: dict[str, Any], run_dir: Path) -> None:
    """Run `hkd-train` with a recipe, or resume the run.

    Args:
        recipe: Settings of the run.
        run_dir: Directory of the run.
    """
    path = run_dir / "recipe.yaml"
    flags = ["--resume", str(run_dir)] if (run_dir / "last.pt").exists() else ["--recipe", str(path)]
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    exit_code = cli.main(flags)
    if exit_code:
        raise SystemExit(exit_code)


def compute_epochs(budget: Budget, row: Row, folder: Path) -> int:
    """Return the epochs of a row: those of the budget, or as many as fit into the time of other rows.

    Args:
        budget: Models and schedule.
        row: The row.
        folder: Directory of the runs of one seed.
    """
    if not row.same_time_as:
        return budget.teacher_epochs if row.model == "teacher" else budget.epochs
    seconds = {name: compute_fastest_seconds(name, folder.parent) for name in row.same_time_as}
    return round(budget.epochs * sum(seconds.values()) / seconds["baseline"])


def compute_fastest_seconds(row: str, runs: Path) -> float:
    """Return the training time per image if every epoch had the speed of the fastest one, over all seeds.

    Other programs on the machine slow down single epochs.

    Args:
        row: Name of the row.
        runs: Directory of the seeds.
    """
    speeds = [read_speeds(path.parent) for path in runs.glob(f"seed*/{row}/results.csv")]
    return len(speeds[0]) / max(map(max, speeds))


def read_speeds(run_dir: Path) -> list[float]:
    """Return the images per second of each epoch.

    Args:
        run_dir: Directory of the run.
    """
    return _read_column(run_dir, "images_per_s")


def read_miss_rates(run_dir: Path) -> list[float]:
    """Return the miss rate on the validation split after each epoch.

    Args:
        run_dir: Directory of the run.
    """
    return _read_column(run_dir, "miss_rate")


def compute_train_seconds(recipe: dict[str, Any], run_dir: Path) -> float:
    """Return the training time without validation; it includes the training of blocks.

    Args:
        recipe: Settings of the run.
        run_dir: Directory of the run.
    """
    num_images, batch = len(load_dataset(recipe["data"], "train")), recipe["batch"]
    images_per_epoch = -(-num_images // batch) * batch
    train_s = sum(images_per_epoch / speed for speed in read_speeds(run_dir))
    return train_s + read_block_seconds(run_dir / "blockwise/report.json")


def read_block_seconds(report: Path) -> float:
    """Return the time of the block stage with the start of its workers, or the sum of the blocks if it was resumed.

    Args:
        report: `blockwise/report.json` of a run; 0 if it does not exist.
    """
    if not report.exists():
        return 0.0
    content = json.loads(report.read_text())
    stats = content["run_stats"]
    return float(stats["startup_s"] + stats["makespan_s"] if stats else content["sum_s"])


def _read_column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "results.csv").open(encoding="utf-8", newline="") as file:
        return [float(line[name]) for line in csv.DictReader(file)]


if __name__ == "__main__":
    main()
