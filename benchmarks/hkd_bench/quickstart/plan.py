"""Plan of `hkd-quickstart --data`: stages with markers in plan.json, choice of the student, and of the epochs."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.config import check_range
from hkd_det.console import format_duration, format_table, log_line
from hkd_det.errors import DataError, UsageError
from hkd_det.files import bytes_sha256, read_json, write_text

PLAN_SCHEMA = 1
NARROW, WIDE = "yolox-nano-hswish", "yolox-nano-x2"  # both start from the weights of hkd-cpu
STUDENT_SIZES = {NARROW: tuple(range(192, 641, 64)), WIDE: tuple(range(192, 449, 64))}  # square inputs, pixels
DEFAULT_SIZE = 320  # of hkd-cpu, for a run without latency budget
DEFAULT_EPOCHS, MIN_EPOCHS, MAX_EPOCHS = 10, 3, 30
MIN_IMAGES_FOR_WIDE = 100  # with fewer training images, no wide network is trained
NUM_INT8_TRIALS, NUM_LAYERS = 10, 104  # evaluations of the search for layers that stay FP32, and layers to rank
START_S, NUM_STATISTICS_IMAGES = 25.0, 192  # start of a training run: processes, statistics of batch normalization

Results = Mapping[str, Any]


@dataclass(frozen=True)
class OwnDataOptions:
    """Flags of `hkd-quickstart --data`.

    Attributes:
        data: Dataset of the user, as for `hkd-train --data`.
        save_dir: Output directory.
        seed: Seed of the training runs.
        max_ms: Maximum median latency from image to boxes in milliseconds; None for no limit.
        device_bench: JSON file of `hkd-bench` on the target device; None measures this device.
        hours: Time budget in hours; None for no limit.
        epochs: Epochs of each training run; None lets the plan choose.
        threads: CPU threads of the measured models; None for the default of the runtime.
        device: Device of the training.
        runs: Timed runs per model in the final measurement.
    """

    data: str
    save_dir: Path
    seed: int = 0
    max_ms: float | None = None
    device_bench: Path | None = None
    hours: float | None = None
    epochs: int | None = None
    threads: int | None = None
    device: str = "auto"
    runs: int = 200

    def __post_init__(self) -> None:
        for flag, value in {"--max-ms": self.max_ms, "--hours": self.hours}.items():
            if value is not None:
                check_range(flag, value, 0, is_open=True)
        for flag, count in {"--epochs": self.epochs, "--threads": self.threads}.items():
            if count is not None:
                check_range(flag, count, 1)
        if self.device_bench is not None and self.max_ms is None:
            raise UsageError("--device-bench: requires --max-ms. The times decide which students fit.")


@dataclass(frozen=True)
class StudentCandidate:
    """A student at one input size, before training.

    Attributes:
        model: Name of the architecture.
        size: Input height and width, pixels.
        p50_ms: Median latency from image to boxes, milliseconds; None if the target device was not measured at it.
        ap50: AP at IoU 0.5 of the initial weights on training images, fraction. Unlike MR^-2, it depends little on the
            few false positives of the highest scores, which are often people without label.
    """

    model: str
    size: int
    p50_ms: float | None
    ap50: float

    @property
    def name(self) -> str:
        """Name of the file without suffix, and name in tables."""
        return f"{self.model}-{self.size}"


@dataclass(frozen=True)
class Speeds:
    """Measured times on this device, in seconds per image at `DEFAULT_SIZE`.

    Attributes:
        train_s: Training step of each architecture.
        forward_s: Forward pass of each architecture, as of a teacher.
        detect_s: Reading an image and running the exported narrow student.
        export_s: Export of one file, seconds per file.
    """

    train_s: dict[str, float]
    forward_s: dict[str, float]
    detect_s: float
    export_s: float


@dataclass(frozen=True)
class TrainingPlan:
    """Decisions before training. The training stages depend on them.

    Attributes:
        model: Architecture of the student.
        size: Input size of the training, pixels.
        epochs: Epochs of each training run.
        teacher: Architecture of the fine-tuned teacher, or "" for the shipped detector itself.
    """

    model: str
    size: int
    epochs: int
    teacher: str


@dataclass(frozen=True)
class DataCounts:
    """Numbers of images.

    Attributes:
        train: Training images.
        val: Validation images.
        total: Images of all splits.
        evaluated: Images of the split of the final measurement.
    """

    train: int
    val: int
    total: int
    evaluated: int


def choose_students(
    candidates: Sequence[StudentCandidate], max_ms: float | None, num_train: int
) -> list[StudentCandidate]:
    """Choose the students that may be trained, the preferred one first.

    The narrow student with the highest AP50 before training determines the input size. The wide student computes
    the same function at first and has more capacity, so it is preferred at this size if it fits the budget.

    Args:
        candidates: All measured candidates.
        max_ms: Latency budget, milliseconds; None selects the narrow student at its default size.
        num_train: Number of training images.

    Returns:
        One or two students.

    Raises:
        UsageError: No candidate fits the budget.
    """
    narrow = [candidate for candidate in candidates if candidate.model == NARROW]
    if max_ms is None:
        return [candidate for candidate in narrow if candidate.size == DEFAULT_SIZE]
    timed = [candidate for candidate in candidates if candidate.p50_ms is not None]
    fitting = [candidate for candidate in timed if candidate.p50_ms is not None and candidate.p50_ms <= max_ms]
    best = min(
        (candidate for candidate in fitting if candidate.model == NARROW),
        key=lambda candidate: (-candidate.ap50, candidate.size),
        default=None,
    )
    if best is None:
        fastest = min(timed, key=lambda candidate: candidate.p50_ms or math.inf)
        raise UsageError(
            f"--max-ms {max_ms:g}: the fastest student, {fastest.name}, takes {fastest.p50_ms:.1f} ms. "
            "Use a larger budget, more --threads or a faster device."
        )
    wide = [candidate for candidate in fitting if candidate.model == WIDE and candidate.size == best.size]
    return [*(wide if num_train >= MIN_IMAGES_FOR_WIDE else []), best]


def choose_size(rows: Sequence[Mapping[str, Any]], trained_size: int, max_ms: float | None) -> tuple[int, bool]:
    """Choose the input size of the export. The size of the training stays unless another one is shown to be better.

    Args:
        rows: size, p50_ms (None without a time), miss_rate and conclusion, compared with the size of the training, of
            each measured size.
        trained_size: Input size of the training, pixels.
        max_ms: Latency budget, milliseconds, or None.

    Returns:
        size: Chosen size. If no size is within the budget, the fastest one.
        is_within: Whether it is within the budget.
    """
    if max_ms is None:
        return trained_size, True
    timed = [row for row in rows if row["p50_ms"] is not None]
    fitting = [row for row in timed if row["p50_ms"] <= max_ms]
    if not fitting:
        return int(min(timed, key=lambda row: row["p50_ms"])["size"]), False
    better = [row for row in fitting if row["conclusion"] == "better"]
    trained = [row for row in fitting if row["size"] == trained_size]
    return int(min(better or trained or fitting, key=lambda row: (row["miss_rate"], row["p50_ms"]))["size"]), True


def estimate_epoch_s(model: str, size: int, teacher: str, speeds: Speeds, counts: DataCounts) -> float:
    """Estimate the time of one epoch with its evaluation, in seconds.

    Args:
        model: Architecture that is trained.
        size: Input size, pixels.
        teacher: Architecture of the teacher, or "" for training without a teacher.
        speeds: Measured times.
        counts: Numbers of images.

    Returns:
        Seconds.
    """
    pixels = (size / DEFAULT_SIZE) ** 2
    step_s = speeds.train_s[model] + (speeds.forward_s[teacher] if teacher else 0.0)
    return counts.train * step_s * pixels + counts.val * (speeds.forward_s[model] * pixels + speeds.detect_s / 2)


def estimate_stages(plan: TrainingPlan, speeds: Speeds, counts: DataCounts) -> dict[str, float]:
    """Estimate the time of each stage that comes after the plan, in seconds.

    Args:
        plan: Decisions.
        speeds: Measured times.
        counts: Numbers of images.

    Returns:
        Name of the stage -> seconds.
    """

    pixels = (plan.size / DEFAULT_SIZE) ** 2

    def training_s(model: str, teacher: str) -> float:
        statistics_s = NUM_STATISTICS_IMAGES * (speeds.forward_s[model] * pixels + speeds.detect_s / 2)
        epochs_s = plan.epochs * estimate_epoch_s(model, plan.size, teacher, speeds, counts)
        return START_S + statistics_s + counts.val * speeds.forward_s[model] * pixels + epochs_s

    factor = speeds.forward_s[plan.model] / speeds.forward_s[NARROW]
    detect_s = speeds.detect_s * max(1.0, pixels * factor)
    sizes = STUDENT_SIZES[plan.model]
    curve_pixels = sum((size / DEFAULT_SIZE) ** 2 for size in sizes)
    return {
        "check": 2 * counts.total * speeds.detect_s,
        "teacher": training_s(plan.teacher, NARROW) if plan.teacher else 0.0,
        "control": training_s(plan.model, ""),
        "distilled": training_s(plan.model, plan.teacher or NARROW),
        "sizes": len(sizes) * speeds.export_s + counts.val * speeds.detect_s * curve_pixels * factor,
        "export": 4 * speeds.export_s
        + (NUM_INT8_TRIALS * counts.val + 5 * min(512, counts.train)) * detect_s
        + NUM_LAYERS * (0.2 * speeds.export_s + 8 * detect_s),
        "bench": 30 + 3 * (counts.evaluated + 400) * detect_s,
        "report": 10.0,
    }


def plan_training(
    students: Sequence[StudentCandidate], options: OwnDataOptions, speeds: Speeds, counts: DataCounts
) -> TrainingPlan:
    """Choose student, teacher and epochs.

    A wide teacher and a wide student are used if the time budget leaves at least `DEFAULT_EPOCHS` epochs.

    Args:
        students: Result of `choose_students`.
        options: Budgets.
        speeds: Measured times.
        counts: Numbers of images.

    Returns:
        The plan.

    Raises:
        UsageError: The time budget is too small for `MIN_EPOCHS` epochs, or for those of `--epochs`.
    """
    plans = []
    for student in students:
        teachers = [WIDE, ""] if student.model == NARROW and counts.train >= MIN_IMAGES_FOR_WIDE else [""]
        plans += [TrainingPlan(student.model, student.size, options.epochs or 1, teacher) for teacher in teachers]
    if options.hours is None:
        return _with_epochs(plans[0], options.epochs or DEFAULT_EPOCHS)
    for plan in plans:
        epochs = _count_epochs(plan, options.hours, speeds, counts)
        if options.epochs is not None and epochs >= options.epochs:
            return plan
        if options.epochs is None and (epochs >= DEFAULT_EPOCHS or (plan is plans[-1] and epochs >= MIN_EPOCHS)):
            return _with_epochs(plan, min(epochs, MAX_EPOCHS))
    epochs = options.epochs or MIN_EPOCHS
    needed_s = sum(estimate_stages(_with_epochs(plans[-1], epochs), speeds, counts).values())
    raise UsageError(
        f"--hours {options.hours:g}: {counts.train} training images and {epochs} epochs take about "
        f"{format_duration(needed_s)} on this device. Use --hours {math.ceil(needed_s / 36) / 100:g} or more."
    )


def _with_epochs(plan: TrainingPlan, epochs: int) -> TrainingPlan:
    return TrainingPlan(plan.model, plan.size, epochs, plan.teacher)


def _count_epochs(plan: TrainingPlan, hours: float, speeds: Speeds, counts: DataCounts) -> int:
    """Return the epochs that fit a time budget; the time grows linearly with them."""
    one, two = (sum(estimate_stages(_with_epochs(plan, epochs), speeds, counts).values()) for epochs in (1, 2))
    return math.floor((3600 * hours - (2 * one - two)) / max(1e-9, two - one))


@dataclass(frozen=True)
class Stage:
    """A step of the workflow that is done once.

    Attributes:
        name: Key in plan.json.
        title: Title in the log.
        settings: Values that the result depends on, in addition to earlier results.
        after: Stages whose results it depends on.
        estimate_s: Estimated time in seconds.
        run: Function that takes the results of all earlier stages and returns its own result, plain JSON values.
        files: Files that the stage writes; the stage is repeated if one is missing.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    after: tuple[str, ...]
    estimate_s: float
    run: Callable[[Results], dict[str, Any]]
    files: tuple[Path, ...] = ()

    def make_key(self, results: Results) -> str:
        """Return a digest of the settings and of the results that the stage depends on.

        Args:
            results: Result of each earlier stage.
        """
        inputs = {"settings": self.settings, "after": {name: results[name] for name in self.after}}
        return bytes_sha256(json.dumps(inputs, sort_keys=True, default=str).encode())


@dataclass
class PlanFile:
    """The state of a run: which stages are done, with their results.

    Attributes:
        path: plan.json.
        records: Stage name -> key, seconds and result.
    """

    path: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "PlanFile":
        """Read the file, or return an empty state if there is none.

        Args:
            path: plan.json.

        Raises:
            DataError: The file is not a plan of this version.
        """
        if not path.exists():
            return cls(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema") != PLAN_SCHEMA:
            raise DataError(f"{path}: not a plan of this version of hkd-quickstart. Choose another --save-dir.")
        return cls(path, content["stages"])

    def is_done(self, stage: Stage, results: Results) -> bool:
        """Return whether a stage is done with the same settings and its files exist.

        Args:
            stage: The stage.
            results: Result of each earlier stage.
        """
        record = self.records.get(stage.name)
        return record is not None and record["key"] == stage.make_key(results) and all(map(Path.exists, stage.files))

    def run(self, stage: Stage, results: Results) -> dict[str, Any]:
        """Run a stage unless it is done, and mark it.

        Args:
            stage: The stage.
            results: Result of each earlier stage.

        Returns:
            The result of the stage.
        """
        if not self.is_done(stage, results):
            start_s = time.monotonic()
            key, result = stage.make_key(results), stage.run(results)
            seconds = round(time.monotonic() - start_s, 1)
            self.records[stage.name] = {"key": key, "seconds": seconds, "result": result}
            write_text(self.path, json.dumps({"schema": PLAN_SCHEMA, "stages": self.records}, indent=1) + "\n")
        return dict(self.records[stage.name]["result"])

    def get_seconds(self, name: str) -> float | None:
        """Return the time that a finished stage took in its last session, or None.

        Args:
            name: Name of the stage.
        """
        record = self.records.get(name)
        return None if record is None else float(record["seconds"])


def run_stages(
    stages: Sequence[Stage], plan_file: PlanFile, results: Results, num_stages: int, later_s: float | None
) -> dict[str, Any]:
    """Run the stages in order. Finished ones are not repeated.

    Args:
        stages: The stages.
        plan_file: State of the run.
        results: Results of the stages before these.
        num_stages: Number of all stages of the workflow, for the log.
        later_s: Estimated time of the stages after these, seconds; None if it is not known yet.

    Returns:
        Results of all stages.
    """
    all_results = dict(results)
    for index, stage in enumerate(stages):
        head = f"[{len(all_results) + 1}/{num_stages}] {stage.title}"
        if plan_file.is_done(stage, all_results):
            log_line(f"{head}: done")
        else:
            left_s = sum(later.estimate_s for later in stages[index:]) + (later_s or 0.0)
            left = "" if later_s is None else f", {format_duration(left_s)} left in all"
            repeated = "; settings, data or files have changed" if stage.name in plan_file.records else ""
            log_line(f"{head}: about {format_duration(stage.estimate_s)}{left}{repeated}")
        all_results[stage.name] = plan_file.run(stage, all_results)
    return all_results


def format_plan(stages: Sequence[Stage], plan_file: PlanFile, results: Results) -> str:
    """Return the stages with their estimated times as a text table.

    Args:
        stages: All stages.
        plan_file: State of the run.
        results: Results of the finished stages.
    """
    rows, left_s, is_known = [], 0.0, True
    for stage in stages:
        is_known = is_known and all(name in results or name in plan_file.records for name in stage.after)
        known = {**{name: record["result"] for name, record in plan_file.records.items()}, **results}
        is_done = is_known and plan_file.is_done(stage, known)
        left_s += 0 if is_done else stage.estimate_s
        rows.append((stage.title, "done" if is_done else format_duration(stage.estimate_s)))
    rows.append(("time left", format_duration(left_s)))
    return format_table(rows, ("stage", "estimated time"), left_columns=1)


def format_candidates(candidates: Sequence[StudentCandidate], plan: TrainingPlan, max_ms: float | None) -> str:
    """Return the students before training as a text table.

    Args:
        candidates: All candidates.
        plan: The plan, whose student is marked.
        max_ms: Latency budget, milliseconds, or None.
    """
    rows = []
    for candidate in candidates:
        p50 = "not measured" if candidate.p50_ms is None else f"{candidate.p50_ms:.1f} ms"
        fits = "" if max_ms is None else "yes" if (candidate.p50_ms or math.inf) <= max_ms else "no"
        mark = "chosen" if (candidate.model, candidate.size) == (plan.model, plan.size) else ""
        size = f"{candidate.size}x{candidate.size}"
        rows.append((candidate.model, size, p50, f"{100 * candidate.ap50:.1f} %", fits, mark))
    headers = ("student before training", "input", "p50", "AP50 on train", "in budget", "")
    return format_table(rows, headers, left_columns=1)


def as_plain(value: Any) -> Any:
    """Return a dataclass as values that survive a round trip through JSON.

    Args:
        value: Dataclass instance.
    """
    return json.loads(json.dumps(asdict(value)))
