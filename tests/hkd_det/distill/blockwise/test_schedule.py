"""Schedules, compared with exhaustive search and closed forms."""

from itertools import product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.distill.blockwise.executor import Scheduler, compute_lower_bound, make_schedule, simulate

SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
TIMES = st.lists(st.integers(1, 50), min_size=1, max_size=6)
WORKERS = st.integers(1, 3)


def best_makespan(times: list[int], workers: int) -> int:
    """Return the best makespan of all assignments of tasks to workers."""
    assignments = product(range(workers), repeat=len(times))
    return min(
        max(sum(t for t, w in zip(times, assignment, strict=True) if w == k) for k in range(workers))
        for assignment in assignments
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(times=TIMES, workers=WORKERS)
@settings(deadline=None)
def test_every_task_is_in_exactly_one_queue(scheduler: Scheduler, times: list[int], workers: int) -> None:
    queues = make_schedule([float(t) for t in times], workers, scheduler)
    assert sorted(task for queue in queues for task in queue) == list(range(len(times)))
    assert all(queues) and (scheduler == "work-stealing" or len(queues) <= workers)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(times=TIMES, workers=WORKERS)
@settings(deadline=None)
def test_makespan_is_between_its_bounds(scheduler: Scheduler, times: list[int], workers: int) -> None:
    best, makespan = best_makespan(times, workers), simulate(times, workers, scheduler)
    assert compute_lower_bound(times, workers) <= best <= makespan <= sum(times)
    if scheduler != "round-robin":  # Graham 1969
        assert makespan <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


@given(times=st.lists(st.floats(0, 100), min_size=1, max_size=20), workers=st.integers(1, 5))
@settings(deadline=None)
def test_round_robin_makespan_matches_closed_form(times: list[float], workers: int) -> None:
    assert simulate(times, workers, "round-robin") == pytest.approx(max(sum(times[k::workers]) for k in range(workers)))


def test_grahams_worst_case_for_two_workers() -> None:
    # Best is 3 3 | 2 2 2. Longest first gives 3 2 2 | 3 2.
    times = [3, 3, 2, 2, 2]
    assert best_makespan(times, 2) == 6
    assert make_schedule(times, 2, "bin-packing") == [[0, 2, 4], [1, 3]]
    assert simulate(times, 2, "bin-packing") == simulate(times, 2, "work-stealing") == 7
    assert simulate(times, 2, "round-robin") == 7 and simulate(times, 1, "round-robin") == 12
    assert simulate(times, 9, "bin-packing") == 3


def test_work_stealing_corrects_a_wrong_estimate() -> None:
    times, expected = [8.0, 1, 1, 1, 1], [1.0, 1, 1, 1, 1]
    assert simulate(times, 2, "bin-packing", expected) == 10  # 8 1 1 | 1 1
    assert simulate(times, 2, "work-stealing", expected) == 8


def test_no_tasks_have_makespan_zero() -> None:
    assert [simulate([], 3, scheduler) for scheduler in SCHEDULERS] == [0, 0, 0]
    assert compute_lower_bound([], 3) == 0


# 3x3 convolutions on CIFAR's 32 x 32 images: (input channels, output channels, side of the output).
VGG16 = [
    (3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 256, 8),
    (256, 512, 4), (512, 512, 4), (512, 512, 4), (512, 512, 2), (512, 512, 2), (512, 512, 2),
]  # fmt: skip
RESNET50 = [(64, 64, 32)] * 3 + [(128, 128, 16)] * 4 + [(256, 256, 8)] * 6 + [(512, 512, 4)] * 3


@pytest.mark.parametrize(("layers", "one_worker", "bin_packing"), [
    (VGG16, 3920, {2: 2215, 3: 1603, 4: 1275}), (RESNET50, 9693, {2: 5061, 3: 3876, 4: 2750}),
])  # fmt: skip
def test_published_makespans_are_above_simulated_ones(
    layers: list[tuple[int, int, int]], one_worker: int, bin_packing: dict[int, int]
) -> None:
    """The paper gives no block times. Times proportional to the MACs of a block give a lower bound."""
    times = [c_in * c_out * side**2 for c_in, c_out, side in layers]
    scale = one_worker / sum(times)
    for workers, published in bin_packing.items():
        simulated = scale * simulate(times, workers, "bin-packing")
        assert one_worker / workers <= simulated <= published  # the simulation has no overhead
        assert simulated <= scale * simulate(times, workers, "round-robin")


def test_published_longest_task_bounds_eight_workers() -> None:
    """VGG16's longest task takes 68 % of the makespan on four GPUs. Eight GPUs cannot halve it."""
    longest = 0.68 * 1275
    times = [longest, *([(3920 - longest) / 12] * 12)]
    assert compute_lower_bound(times, 4) == pytest.approx(3920 / 4) and compute_lower_bound(times, 8) == longest
    assert simulate(times, 4, "bin-packing") <= 1275
