"""What the distillation study trains: a budget fixes sizes and schedule, a row one student and how it is taught."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "real_data.yaml"


@dataclass(frozen=True)
class Budget:
    """Models, schedule and machine; settings go into every recipe.

    teacher_epochs: more than the students', as whoever distils has a good teacher already.
    """

    name: str
    teacher: str
    student: str
    imgsz_hw: tuple[int, int]
    epochs: int
    teacher_epochs: int
    settings: dict[str, Any] = field(default_factory=dict)


# Few epochs: views close to what is measured teach faster than varied ones, and rates can be high.
SHORT = {"batch": 16, "lr": 2e-3, "mosaic": 0.25, "multi_scale": 0.1, "finale": 0.25, "ema_decay": 0.99}
BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("trial", "mini-teacher", "mini-student", (64, 96), 1, 2, {**SHORT, "workers": 0}),
        Budget("small", "mini-teacher", "mini-student", (160, 224), 4, 8, {**SHORT, "device": "cpu", "workers": 1}),
        # The same pair, teacher and students for five times as long: is a teacher of use to a student that has time?
        Budget("medium", "mini-teacher", "mini-student", (160, 224), 19, 19, {**SHORT, "device": "cpu", "workers": 1}),
        Budget("full", "teacher-r50", "student-r18", (512, 640), 60, 60, {"batch": 32, "device": "cuda", "workers": 8}),
    )
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    model: "teacher" or "student" of the budget, or "trained teacher": starts with the teacher's shape and weights.
    distill: the recipe's methods. as_long_as: names of rows whose training time together is this one's (then its epochs
    follow from measured times); else the budget's for teacher or students.
    """

    name: str
    title: str
    model: str = "student"
    distill: dict[str, Any] = field(default_factory=dict)
    as_long_as: tuple[str, ...] = ()

    def recipe(self, budget: Budget, seed: int, folder: Path, epochs: int) -> dict[str, Any]:
        """Settings of `hkd-train --recipe`."""
        teacher = str(folder / "teacher/best.pt")
        taught = {"teacher": teacher, "distill": self.distill} if self.distill else {}
        match self.model:
            case "teacher":
                start = {"model": budget.teacher}
            case "student":
                start = {"model": budget.student}
            case _:
                # cdd and blockwise begin as their teacher where no model is named.
                start = {} if self.distill else {"init": teacher}
        return {
            "data": str(DATA),
            **start,
            "run": str(folder / self.name),
            "imgsz_hw": list(budget.imgsz_hw),
            "epochs": epochs,
            "seed": seed,
            **taught,
            **budget.settings,
        }


ROWS = (
    Row("teacher", "teacher", "teacher"),
    Row("alone", "student alone"),
    Row("long", "student alone, as long as teacher and student", as_long_as=("teacher", "alone")),
    Row("hkd", "HKD", distill={"hkd": {}}),
    Row("noise", "noisy teacher (L2 on logits)", distill={"noise": {"form": "l2"}}),
    Row("hkd-noise", "HKD + noisy targets", distill={"hkd": {}, "noise": {"form": "targets"}}),
    Row("mokd", "HKD + MoKD", distill={"hkd": {}, "mokd": {}}),
    Row("again", "teacher, trained on as CDD and blockwise are", "trained teacher"),
    Row("cdd", "CDD", "trained teacher", {"cdd": {"keep_flops": 0.35}}),
    Row("blockwise", "blockwise", "trained teacher", {"blockwise": {}}),
    Row("best", "HKD + noise + MoKD", distill={"hkd": {}, "noise": {"form": "targets"}, "mokd": {}}),
)
