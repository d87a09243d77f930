"""Try single changes of recipe and distillation, each against the same control with the same seeds.

    python benchmarks/studies/distillation_trials.py --data DATA.yaml --audited AUDITED.yaml [--seeds 0,1,2] [--only A]

Every student has the models and the schedule of the budget `small` (distillation_plan.py), the initial weights of its
seed, and the same teacher, which is trained once. DATA.yaml: see real_data.yaml. AUDITED.yaml has a split `test` of the
same images with other annotations. The split `val` decides; `test` is reported beside it. Finished runs are not
repeated, and an interrupted study continues with the same command. Seeds may run in parallel, each with its --seeds.

The intervals are over resampled images: each resample compares the mean miss rate of the seeds of both rows. The
detections are stored in the directories of the runs, so that `--report` computes all figures from them.
Results: results/distillation_trials.md
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from distillation import train
from distillation_plan import BUDGETS, Row
from numpy.typing import NDArray

from hkd_det.console import format_table
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.metrics.bootstrap import NUM_RESAMPLES, compute_ends, resample_miss_rates
from hkd_det.metrics.citypersons import REASONABLE, CityPersonsSetup, evaluate
from hkd_det.metrics.coco import make_ground_truth
from hkd_det.metrics.coco_files import read_coco_detections, write_coco_detections
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.train.baseline import make_height_setups
from hkd_det.train.engine import predict_dataset

RESULT_FILE = Path(__file__).parents[1] / "results/distillation_trials.md"
BUDGET = BUDGETS["small"]
TEACHER = Row("teacher", "teacher", "teacher")
CONSTANT = {"distill_schedule": "constant"}
QUARTER_LR = {"lr": 5e-4}
OLD_CDD = {"ranking": "response", "min_width_ratio": 0.0}
ALL_PARTS = {"parts": ["backbone", "neck", "head"]}


def make_hkd_row(name: str, title: str, settings: dict[str, object] | None = None, **hkd: object) -> Row:
    """Return a row with HKD.

    Args:
        name: Name of the row.
        title: Text in the table.
        settings: Settings of the recipe that differ from the control.
        hkd: Settings of the method that differ from the control.
    """
    return Row(name, title, distill={"hkd": hkd}, settings=settings or {})


@dataclass(frozen=True)
class TrialGroup:
    """A control, and rows that differ from it in one point.

    Attributes:
        control: The control.
        trials: The other rows.
    """

    control: Row
    trials: tuple[Row, ...]


GROUPS = (
    TrialGroup(
        Row("baseline", "student without teacher"),
        (Row("ema-5", "EMA horizon of 5 % of the steps: decay 0.981, not 0.99", settings={"ema_decay": 0.981}),),
    ),
    TrialGroup(
        make_hkd_row("hkd", "HKD"),
        (
            make_hkd_row("constant", "constant weight", CONSTANT),
            make_hkd_row("constant-to-end", "constant weight to the last epoch", CONSTANT | {"no_distill_ratio": 0.0}),
            make_hkd_row("region-height", "region level by height", region_level="height"),
            make_hkd_row("region-batch", "regions standardized over the batch", region_norm="batch"),
            make_hkd_row("weights", "weights pyramid 6, score 4, box 4", pyramid=6.0, cls=4.0, box=4.0),
            make_hkd_row("person", "foreground weighted per person", fg_weights="person"),
            make_hkd_row("staged", "features from a third of the steps on", start={"pyramid": 0.34, "region": 0.34}),
            make_hkd_row("floor", "cosine weight from 1 to 0.1", {"min_distill_weight": 0.1}),
            make_hkd_row("region-all", "regions from all levels", region_level="all"),
            Row("cwd", "CWD instead of the pyramid level", distill={"hkd": {"pyramid": 0.0}, "cwd": {}}),
            Row(
                "crosskd",
                "cross-head instead of the logit level",
                distill={"hkd": {"cls": 0.0, "box": 0.0}, "crosskd": {}},
            ),
        ),
    ),
    TrialGroup(
        Row("teacher-long", "teacher, fine-tuned for the same epochs", "trained teacher"),
        (
            Row("teacher-long-lr", "a quarter of the learning rate", "trained teacher", settings=QUARTER_LR),
            Row("cdd", "CDD, -65 % FLOPs", "trained teacher", {"cdd": {}}),
            Row("cdd-lr", "CDD, a quarter of the learning rate", "trained teacher", {"cdd": {}}, settings=QUARTER_LR),
            Row("cdd-response", "CDD, ranked by response", "trained teacher", {"cdd": OLD_CDD}),
            Row("cdd-hkd", "CDD and HKD", "trained teacher", {"cdd": {}, "hkd": {}}),
            Row("blockwise-lr", "blockwise, backbone", "trained teacher", {"blockwise": {}}, settings=QUARTER_LR),
            Row(
                "blockwise-all",
                "blockwise, all parts",
                "trained teacher",
                {"blockwise": ALL_PARTS},
                settings=QUARTER_LR,
            ),
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data YAML with the splits train, val and test")
    parser.add_argument("--audited", type=Path, required=True, help="data YAML with other annotations of `test`")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="", help="comma-separated names of rows, without their controls")
    parser.add_argument("--runs", type=Path, default=Path("runs/trials"), help="directory of the runs")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="Markdown file of the report")
    parser.add_argument("--report", action="store_true", help="write the report without training")
    arguments = parser.parse_args(argv)
    rows = [row for group in GROUPS for row in (group.control, *group.trials)]
    selected = arguments.only.split(",") if arguments.only else [row.name for row in rows]
    if unknown := set(selected) - {row.name for row in rows}:
        parser.error(
            f"--only: unknown rows {', '.join(sorted(unknown))}. Choose from {', '.join(r.name for r in rows)}."
        )
    if not arguments.report:
        if any(row.distill or row.model != "student" for row in rows if row.name in selected):
            run_row(TEACHER, arguments.data, 0, arguments.runs)
        for row in rows:
            for seed in map(int, arguments.seeds.split(",")):
                if row.name in selected:
                    run_row(row, arguments.data, seed, arguments.runs)
    write_text(arguments.output, format_page(arguments.data, arguments.audited, arguments.runs))


def run_row(row: Row, data: Path, seed: int, runs: Path) -> None:
    """Train one student, or continue, and store its detections on `val` and `test`; a finished run is skipped.

    Args:
        row: The row.
        data: Data YAML.
        seed: Seed of the run.
        runs: Directory of the runs.
    """
    run_dir = runs / f"{row.name}-{seed}"
    if (run_dir / "test.json").exists():
        return
    print(f"\n== seed {seed}: {row.title}", flush=True)
    epochs = BUDGET.teacher_epochs if row.model == "teacher" else BUDGET.epochs
    train(row.make_recipe(BUDGET, data, seed, run_dir, runs / "teacher-0/best.pt", epochs), run_dir)
    detector = load_detector_checkpoint(run_dir / "best.pt").build()
    for split in ("val", "test"):  # `test.json` is written last and marks a finished run
        samples = load_dataset(str(data), split)
        detections = predict_dataset(detector, samples, BUDGET.imgsz_hw)
        write_coco_detections(run_dir / f"{split}.json", list(range(len(samples))), detections)


@dataclass(frozen=True)
class TestSet:
    """Images with ground truth on which the stored detections of a split are evaluated.

    Attributes:
        title: Head of the column.
        split: `val` or `test`: the file of detections.
        samples: The images.
        setup: Setup of the miss rate.
    """

    title: str
    split: str
    samples: Sequence[Sample]
    setup: CityPersonsSetup = REASONABLE


def format_page(data: Path, audited: Path, runs: Path) -> str:
    """Return the Markdown page with one table per control.

    Args:
        data: Data YAML.
        audited: Data YAML with other annotations of `test`.
        runs: Directory of the runs.
    """
    val, test = (load_dataset(str(data), split) for split in ("val", "test"))
    small = next(setup for setup in make_height_setups() if setup.name == "50-100 px")
    sets = [
        TestSet("validation", "val", val),
        TestSet("validation, 50-100 px", "val", val, small),
        TestSet("test", "test", test),
        TestSet("test, audited", "test", load_dataset(str(audited), "test")),
    ]
    tables = [format_group(group, sets, runs) for group in GROUPS]
    return "\n".join(
        [
            "# Single changes of recipe and distillation",
            "",
            f"Each row differs from its control in one point. {BUDGET.student}, {BUDGET.epochs} epochs at "
            f"{BUDGET.imgsz_hw[1]}x{BUDGET.imgsz_hw[0]}; teacher: {BUDGET.teacher}, {BUDGET.teacher_epochs} epochs.",
            "",
            "```bash",
            "python benchmarks/studies/distillation_trials.py --data DATA.yaml --audited AUDITED.yaml",
            "```",
            "",
            "MR^-2 Reasonable, unless a height is given: mean of the seeds, percent. In brackets the difference to the "
            "control with its 95 % interval over images; bold where the interval excludes 0.",
            "",
            *(line for table in tables if table for line in (table, "")),
        ]
    )


def format_group(group: TrialGroup, sets: Sequence[TestSet], runs: Path) -> str:
    """Return the table of one control and its finished rows. Empty without a finished control.

    Args:
        group: Control and rows.
        sets: Columns.
        runs: Directory of the runs.
    """
    seeds = {row.name: find_seeds(row, runs) for row in (group.control, *group.trials)}
    control_seeds = seeds[group.control.name]
    if not control_seeds:
        return ""
    references = [resample_row(group.control, test_set, runs, control_seeds) for test_set in sets]
    cells = [[group.control.title, str(len(control_seeds)), *(f"{100 * r.mean:.1f}" for r in references)]]
    for row in group.trials:
        # The same seeds on both sides: a seed gives both rows their initial weights and their order of images.
        common = [seed for seed in seeds[row.name] if seed in control_seeds]
        if common:
            texts = [compare_rows(row, group.control, test_set, runs, common) for test_set in sets]
            cells.append([row.title, str(len(common)), *texts])
    return format_table(cells, ["", "seeds", *(test_set.title for test_set in sets)], style="github")


def find_seeds(row: Row, runs: Path) -> list[int]:
    """Return the seeds of the finished runs of a row.

    Args:
        row: The row.
        runs: Directory of the runs.
    """
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in runs.glob(f"{row.name}-[0-9]/test.json"))


@dataclass(frozen=True, eq=False)
class RowMissRates:
    """Miss rates of one row.

    Attributes:
        mean: Mean of the seeds, fraction.
        resampled (array[N]): The mean of the seeds in each resample of the images, fraction.
    """

    mean: float
    resampled: NDArray[np.float64]


def resample_row(row: Row, test_set: TestSet, runs: Path, seeds: Sequence[int]) -> RowMissRates:
    """Evaluate the stored detections of a row.

    Args:
        row: The row.
        test_set: Ground truth.
        runs: Directory of the runs.
        seeds: Seeds of the runs.
    """
    ground_truth = make_ground_truth(test_set.samples)
    results = []
    for seed in seeds:
        file = runs / f"{row.name}-{seed}" / f"{test_set.split}.json"
        detections = read_coco_detections(file, ground_truth)
        results.append(evaluate(ground_truth.table, detections, [test_set.setup])[test_set.setup.name])
    resampled = resample_miss_rates(results, NUM_RESAMPLES, seed=0)
    return RowMissRates(statistics.fmean(result.value for result in results), resampled.mean(0))


def compare_rows(row: Row, control: Row, test_set: TestSet, runs: Path, seeds: Sequence[int]) -> str:
    """Return the miss rate of a row and its difference to the control over the same seeds.

    Args:
        row: The row.
        control: Its control.
        test_set: Ground truth.
        runs: Directory of the runs.
        seeds: Seeds of both.
    """
    ours, reference = (resample_row(which, test_set, runs, seeds) for which in (row, control))
    low, high = compute_ends(ours.resampled - reference.resampled)
    text = f"{100 * (ours.mean - reference.mean):+.1f}: {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * ours.mean:.1f} ({f'**{text}**' if low > 0 or high < 0 else text})"


if __name__ == "__main__":
    main()
