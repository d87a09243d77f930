"""Whole small runs that shrink."""

import json
from pathlib import Path

import pytest
import torch

from hkd_det.distill.capacity.settings import CapacityDynamic
from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import Noise
from hkd_det.errors import UsageError
from hkd_det.models import sizes
from hkd_det.models.detector import DetectorSpec
from hkd_det.models.sizes import cost
from hkd_det.train.checkpoint import read_detector, read_state
from hkd_det.train.command import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import TrainResult, train

TINY = DetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "mini-student", TINY)


def test_it_runs(people: Path, tmp_path: Path) -> None:
    flags = [
        "--data",
        str(people),
        "--imgsz",
        "96x64",
        "--epochs",
        "2",
        "--batch",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--project",
        str(tmp_path),
    ]
    assert main([*flags, "--model", "mini-student", "--name", "teacher"]) == 0
    assert (
        main(
            [
                *flags,
                "--teacher",
                str(tmp_path / "teacher/best.pt"),
                "--distill",
                "cdd",
                "--keep-flops",
                "0.8",
                "--name",
                "cdd",
            ]
        )
        == 0
    )
    best = read_detector(tmp_path / "cdd/best.pt")
    print(best.changes, (tmp_path / "cdd/results.csv").read_text())
    print(
        cost(best.build(), (64, 96)).flops / cost(read_detector(tmp_path / "teacher/best.pt").build(), (64, 96)).flops
    )
