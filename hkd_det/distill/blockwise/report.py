"""Report: what each block came to, how long it took, and how far the schedule was from the best there is."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from hkd_det.distill.blockwise.schedule import Scheduler, lower_bound, replay
from hkd_det.distill.blockwise.stage import Course
from hkd_det.files import write_text

REPLAYED_ON = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Assembled:
    """What was put together, judged on the validation split before fine-tuning.

    miss_rate_teacher, miss_rate: MR^-2 of the run's setup, fractions. miss_rates_alone: of each block alone in the
    teacher, by layer; empty if they were not judged. left_out: layers whose blocks were not taken.
    parameters, flops: of teacher and assembled network, a picture of the run's size.
    """

    miss_rate_teacher: float
    miss_rate: float
    miss_rates_alone: dict[str, float]
    left_out: list[str]
    parameters: tuple[int, int]
    flops: tuple[int, int]


def write_report(path: Path, course: Course, scheduler: Scheduler, result: Assembled) -> None:
    """`report.json`: times in seconds, errors as in `Learnt`; `replayed_s` are makespans on other numbers of workers.

    `ran` is null if the blocks come from several starts, one of which was broken off.
    """
    times = [learnt.seconds for learnt in course.learnt]
    ran = course.ran
    content: dict[str, Any] = {
        "scheduler": scheduler,
        "ran": {**asdict(ran), "lower_bound_s": lower_bound(times, ran.workers)} if ran else None,
        "sum_s": sum(times),
        "replayed_s": replayed(times),
        **asdict(result),
        "blocks": [{**asdict(learnt), "unexplained": learnt.unexplained} for learnt in course.learnt],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def replayed(times: Sequence[float]) -> dict[str, dict[str, float]]:
    """Makespans, s, of measured block times under every schedule, by number of workers, and the bound below them."""
    schedules = {name: {str(n): replay(times, n, name) for n in REPLAYED_ON} for name in get_args(Scheduler)}
    return {**schedules, "lower bound": {str(n): lower_bound(times, n) for n in REPLAYED_ON}}
