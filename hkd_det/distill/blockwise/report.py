"""Report: what each block came to, how long it took, and how far the schedule was from the best there is."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from hkd_det.distill.blockwise.schedule import Scheduler, compute_lower_bound, simulate
from hkd_det.distill.blockwise.stage import StageResult
from hkd_det.files import write_text

SIMULATED_WORKERS = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class AssemblyResult:
    """What was put together, judged on the validation split before fine-tuning.

    miss_rate_teacher, miss_rate: MR^-2 of the run's setup, fractions. miss_rates_alone: of each block alone in the
    teacher, by layer; empty if they were not judged. left_out: layers whose blocks were not taken.
    parameters, flops: of teacher and assembled network, a picture of the run's size.
    """

    teacher_miss_rate: float
    miss_rate: float
    block_miss_rates: dict[str, float]
    excluded_layers: list[str]
    parameters: tuple[int, int]
    flops: tuple[int, int]


def write_blockwise_report(
    path: Path, stage_result: StageResult, scheduler: Scheduler, assembly_result: AssemblyResult
) -> None:
    """`report.json`: times in seconds, errors as in `Learnt`; `replayed_s` are makespans on other numbers of workers.

    `ran` is null if the blocks come from several starts, one of which was broken off.
    """
    times = [learnt.seconds for learnt in stage_result.block_results]
    ran = stage_result.run_stats
    content: dict[str, Any] = {
        "scheduler": scheduler,
        "ran": {**asdict(ran), "lower_bound_s": compute_lower_bound(times, ran.num_workers)} if ran else None,
        "sum_s": sum(times),
        "replayed_s": simulate_makespans(times),
        **asdict(assembly_result),
        "blocks": [{**asdict(learnt), "unexplained": learnt.residual_ratio} for learnt in stage_result.block_results],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def simulate_makespans(times: Sequence[float]) -> dict[str, dict[str, float]]:
    """Makespans, s, of measured block times under every schedule, by number of workers, and the bound below them."""
    schedules = {name: {str(n): simulate(times, n, name) for n in SIMULATED_WORKERS} for name in get_args(Scheduler)}
    return {**schedules, "lower bound": {str(n): compute_lower_bound(times, n) for n in SIMULATED_WORKERS}}
