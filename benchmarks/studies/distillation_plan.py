"""Configuration of the distillation study: a budget sets models and schedule, a row one student and its method."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Models, schedule and hardware.

    Attributes:
        name: Name of the budget.
        teacher: Model name of the teacher.
        student: Model name of the student.
        imgsz_hw: Input height and width, pixels.
        epochs: Epochs of the students.
        teacher_epochs: Epochs of the teacher; more, because distillation starts from a good teacher.
        settings: Further settings of every recipe.
    """

    name: str
    teacher: str
    student: str
    imgsz_hw: tuple[int, int]
    epochs: int
    teacher_epochs: int
    settings: dict[str, Any] = field(default_factory=dict)


# With few epochs, weak augmentation and a high learning rate give better results.
SHORT = {
    "batch": 16,
    "lr": 2e-3,
    "mosaic": 0.25,
    "multi_scale": 0.1,
    "no_aug_ratio": 0.25,
    "no_distill_ratio": 0.25,
    "ema_decay": 0.99,
}
BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("trial", "mini-teacher", "mini-student", (64, 96), 1, 2, {**SHORT, "workers": 0}),
        Budget("small", "mini-teacher", "mini-student", (160, 224), 4, 8, {**SHORT, "device": "cpu", "workers": 1}),
        # The models of "small" with about five times the epochs: the effect of distillation after longer training.
        Budget("medium", "mini-teacher", "mini-student", (160, 224), 19, 19, {**SHORT, "device": "cpu", "workers": 1}),
        Budget("full", "teacher-r50", "student-r18", (512, 640), 60, 60, {"batch": 32, "device": "cuda", "workers": 8}),
    )
}


@dataclass(frozen=True)
class Row:
    """One row of the result table.

    Attributes:
        name: Name of the row and of its run directory.
        title: Text in the table.
        model: "teacher" or "student" of the budget, or "trained teacher" (architecture and weights of the teacher).
        distill: The `distill` section of the recipe.
        same_time_as: Names of rows whose total training time this row gets. Its epochs follow from measured times.
        settings: Settings of the recipe that replace those of the budget.
    """

    name: str
    title: str
    model: str = "student"
    distill: dict[str, Any] = field(default_factory=dict)
    same_time_as: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def make_recipe(
        self, budget: Budget, data: Path, seed: int, save_dir: Path, teacher: Path, epochs: int
    ) -> dict[str, Any]:
        """Return the settings for `hkd-train --recipe`.

        Args:
            budget: Models and schedule.
            data: Data YAML.
            seed: Seed of the run.
            save_dir: Directory of the run.
            teacher: Checkpoint of the teacher.
            epochs: Epochs of the run.
        """
        distillation = {"teacher": str(teacher), "distill": self.distill} if self.distill else {}
        match self.model:
            case "teacher":
                start = {"model": budget.teacher}
            case "student":
                start = {"model": budget.student}
            case _:
                # Without `model`, CDD and blockwise start from the teacher.
                start = {} if self.distill else {"weights": str(teacher)}
        return {
            "data": str(data),
            **start,
            "save_dir": str(save_dir),
            "imgsz_hw": list(budget.imgsz_hw),
            "epochs": epochs,
            "seed": seed,
            **distillation,
            **budget.settings,
            **self.settings,
        }


ROWS = (
    Row("teacher", "teacher", "teacher"),
    Row("baseline", "student without teacher"),
    Row("baseline-long", "student without teacher, time of teacher + student", same_time_as=("teacher", "baseline")),
    Row("hkd", "HKD", distill={"hkd": {}}),
    Row("noisy-teacher", "noisy teacher (L2 on logits)", distill={"noisy_teacher": {"mode": "l2"}}),
    Row("hkd-noisy-teacher", "HKD + noisy targets", distill={"hkd": {}, "noisy_teacher": {"mode": "targets"}}),
    Row("mokd", "HKD + MoKD", distill={"hkd": {}, "mokd": {}}),
    Row("teacher-long", "teacher, fine-tuned like CDD and blockwise", "trained teacher"),
    Row("cdd", "CDD", "trained teacher", {"cdd": {"keep_flops": 0.35}}),
    Row("blockwise", "blockwise", "trained teacher", {"blockwise": {}}),
    Row(
        "hkd-noisy-teacher-mokd",
        "HKD + noisy targets + MoKD",
        distill={"hkd": {}, "noisy_teacher": {"mode": "targets"}, "mokd": {}},
    ),
)
