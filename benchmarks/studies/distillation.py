"""What each way of teaching is worth: teacher, student alone, student alone for longer, student under every method.

    python benchmarks/studies/distillation.py --budget small [--seeds 0,1,2] [--only hkd,alone] [--report]
    python benchmarks/studies/distillation.py --budget medium --only alone,hkd-noise [--student slim-student]

Trains on the real pictures in ../shared/data (INRIA and `people`), chooses the epoch on `people`'s validation pictures
and measures on INRIA's test pictures, which nothing before has seen. Within a seed all students begin with the same
weights and follow the same schedule. What is finished is not done again: the study can be stopped at any time and goes
on where it was, in the middle of a run too. At the end the table, JSON and plot of all that is there are written
anew: results/distillation_BUDGET.{md,json,png}. Seeds are independent: several can be trained side by side (one core
each: OMP_NUM_THREADS=1 taskset -c 0 python ... --seeds 0), or elsewhere, and put together by --also.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from distillation_plan import BUDGETS, DATA, ROWS, Budget, Row
from distillation_report import write_report

from hkd_bench.host import RaplMeter
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.train import cli as command
from hkd_det.train.baseline import evaluate_detector

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of rows, comma-separated; those they need come along")
    parser.add_argument(
        "--student", default="", help="a --model in place of the budget's student, in a report of its own"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--results", type=Path, default=HERE / "../results", help="folder of the report")
    parser.add_argument("--report", action="store_true", help="train nothing, only write the report")
    parser.add_argument("--also", type=Path, help="an earlier report's JSON: its seeds that are not trained here")
    arguments = parser.parse_args(argv)
    budget = BUDGETS[arguments.budget]
    if arguments.student:
        budget = replace(budget, name=f"{budget.name}_{arguments.student}", student=arguments.student)
    runs = arguments.runs / budget.name
    names = {row.name for row in ROWS}
    wanted = {"teacher", *arguments.only.split(",")} if arguments.only else names
    if not wanted <= names:
        parser.error(f"--only: {', '.join(sorted(wanted - names))}: there are {', '.join(row.name for row in ROWS)}")
    wanted |= {name for row in ROWS if row.name in wanted for name in row.as_long_as}
    if not arguments.report:
        for seed in map(int, arguments.seeds.split(",")):
            for row in ROWS:
                if row.name in wanted:
                    run_row(budget, row, seed, runs / f"seed{seed}")
    write_report(budget, runs, arguments.results, arguments.also)


def run_row(budget: Budget, row: Row, seed: int, folder: Path) -> None:
    """Train one student, or go on with it, and judge it; nothing if that is done."""
    run, done = folder / row.name, folder / row.name / "judged.json"
    if done.exists():
        return
    print(f"\n== seed {seed}: {row.title}", flush=True)
    recipe = row.recipe(budget, seed, folder, epochs_of(budget, row, folder))
    meter = RaplMeter()
    train(recipe, run)
    energy = meter.total()
    checkpoint = load_detector_checkpoint(run / "best.pt")
    bf16 = checkpoint.config["precision"] == "bf16"
    judged, _ = evaluate_detector(checkpoint.build(), load_dataset(str(DATA), "test"), budget.imgsz_hw, bf16)
    content = {
        "row": row.name,
        "seed": seed,
        "recipe": recipe,
        **asdict(judged),
        "best_epoch": checkpoint.epoch,
        "course": course(run),
        "train_s": seconds(recipe, run),
        "energy": asdict(energy),
    }
    write_text(done, json.dumps(content, indent=1) + "\n")


def train(recipe: dict[str, Any], run: Path) -> None:
    """By the command itself, as a user would."""
    path = run / "recipe.yaml"
    flags = ["--resume", str(run)] if (run / "last.pt").exists() else ["--recipe", str(path)]
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    code = command.main(flags)
    if code:
        raise SystemExit(code)


def epochs_of(budget: Budget, row: Row, folder: Path) -> int:
    """The budget's, or as many as fit into the time of other rows together."""
    if not row.as_long_as:
        return budget.teacher_epochs if row.model == "teacher" else budget.epochs
    spent = {name: undisturbed(name, folder.parent) for name in row.as_long_as}
    return round(budget.epochs * sum(spent.values()) / spent["alone"])


def undisturbed(row: str, runs: Path) -> float:
    """Training seconds a picture, as if every epoch had been as quick as any seed's quickest: machines are shared."""
    speeds = [speeds_of(path.parent) for path in runs.glob(f"seed*/{row}/results.csv")]
    return len(speeds[0]) / max(map(max, speeds))


def speeds_of(run: Path) -> list[float]:
    """Pictures a second in each epoch."""
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        return [float(line["pictures_per_s"]) for line in csv.DictReader(file)]


def course(run: Path) -> list[float]:
    """Miss rate on the validation pictures after each epoch."""
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        return [float(line["miss_rate"]) for line in csv.DictReader(file)]


def seconds(recipe: dict[str, Any], run: Path) -> float:
    """Training time without validation; of blockwise students with the blocks' own."""
    pictures, batch = len(load_dataset(str(DATA), "train")), recipe["batch"]
    views = -(-pictures // batch) * batch
    return sum(views / speed for speed in speeds_of(run)) + block_seconds(run / "blockwise/report.json")


def block_seconds(report: Path) -> float:
    """What the blocks took, their workers' start included; all of them one after the other if a start broke off."""
    if not report.exists():
        return 0.0
    content = json.loads(report.read_text())
    ran = content["ran"]
    return float(ran["started_s"] + ran["makespan_s"] if ran else content["sum_s"])


if __name__ == "__main__":
    main()
