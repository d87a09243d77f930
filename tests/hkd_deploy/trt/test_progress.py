"""The bar of a build, from phases inside phases."""

import pytest

from hkd_deploy.trt.progress import BuildProgress


@pytest.fixture
def progress() -> BuildProgress:
    return BuildProgress("building")


def percent(progress: BuildProgress) -> float:
    return float(progress._bar.n)


def test_phases_inside_phases_are_parts_of_a_step(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 4)
        assert percent(progress) == 0
        assert progress.step("all")
        assert percent(progress) == 25
        progress.start("part", "all", 2)
        assert progress.step("part")
        assert percent(progress) == pytest.approx(25 + 25 / 2)
        progress.start("deeper", "part", 5)
        assert progress.step("deeper")
        assert percent(progress) == pytest.approx(25 + 25 / 2 + 25 / 10)
        for phase in ("deeper", "part"):
            progress.finish(phase)
        assert progress.step("all")
        assert percent(progress) == 50
        progress.finish("all")
        progress.start("next", None, 10)
        assert percent(progress) == 0
        progress.step("next")
        assert percent(progress) == 10


def test_it_never_goes_back_nor_beyond(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 1)
        progress.step("all")
        progress.step("all")  # one step too many
        progress.start("late", "all", 10)
        assert percent(progress) == 100
        progress.step("never announced")
        progress.finish("never announced")
        assert percent(progress) == 100


def test_a_cancelled_build_is_told_to_stop(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 0)
        progress.cancel()
        assert not progress.step("all")
