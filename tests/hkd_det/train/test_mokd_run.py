"""Whole small runs with MoKD: every family learns, and a resumed run is the unbroken one."""

import csv
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from hkd_det.distill.arbitration import Arbitration
from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import Noise
from hkd_det.models import sizes
from hkd_det.models.detector import Detector, DetectorSpec
from hkd_det.models.faster_rcnn import FasterRcnn, FasterRcnnSpec
from hkd_det.models.yolo import YoloSpec, yolo_spec
from hkd_det.train import run as runs
from hkd_det.train.checkpoint import DetectorCheckpoint, read_state, write_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import train

pytestmark = pytest.mark.slow
TINY = DetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TWO_STAGE = FasterRcnnSpec("resnet18", width=0.125, channels=8, head_width=16, anchor_px=(16, 32, 64, 128, 256))


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = deepcopy(yolo_spec("yolo11n").layout)
    layout["scales"][layout["scale"]][1] = 0.0625
    monkeypatch.setitem(sizes.SIZES, "mini-student", TINY)
    monkeypatch.setitem(sizes.SIZES, "fasterrcnn-r18", TWO_STAGE)
    monkeypatch.setitem(sizes.SIZES, "yolo11n", YoloSpec("yolo11n", {**layout, "nc": 1}))  # type: ignore[arg-type]


def settings(people: Path, run: Path, teacher: Path, methods: Methods, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(people), "model": "mini-student", "run": str(run), "imgsz_hw": (64, 96), "epochs": 2, "batch": 4,
        "workers": 0, "device": "cpu", "finale": 0.0, "teacher": str(teacher), "distill": methods,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(3)
    paths = {"dense": tmp_path / "dense.pt", "two-stage": tmp_path / "two.pt"}
    write_detector(paths["dense"], DetectorCheckpoint("tiny", TINY, Detector(TINY).state_dict(), {}, 1, 1.0))
    two = FasterRcnn(TWO_STAGE).state_dict()
    write_detector(paths["two-stage"], DetectorCheckpoint("two", TWO_STAGE, two, {}, 1, 1.0))
    return paths


@pytest.mark.parametrize(
    ("model", "teacher", "mokd"),
    [
        ("mini-student", "dense", Arbitration()),
        ("fasterrcnn-r18", "two-stage", Arbitration("min-norm")),
        ("fasterrcnn-r18", "two-stage", Arbitration(at="feature")),
        ("fasterrcnn-r18", "dense", Arbitration()),
        ("yolo11n", "dense", Arbitration("min-norm", at="feature")),
    ],
    ids=lambda value: f"{value.rule}-{value.at}" if isinstance(value, Arbitration) else value,
)
def test_hkd_with_noise_and_mokd_trains(
    people: Path, tmp_path: Path, teachers: dict[str, Path], model: str, teacher: str, mokd: Arbitration
) -> None:
    methods = Methods(hkd=Hierarchical(), noise=Noise(), mokd=mokd)
    result = train(settings(people, tmp_path / "run", teachers[teacher], methods, model=model, epochs=2, finale=0.5))
    first, last = result.history
    assert set(first.figures) == {"mokd_cosine", "mokd_dominance", "mokd_share"} and not last.figures
    assert -1 <= first.figures["mokd_cosine"] <= 1 and 0 < first.figures["mokd_share"] < 1
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").read_text().splitlines()))
    assert float(rows[0]["mokd_share"]) == first.figures["mokd_share"] and rows[1]["mokd_share"] == ""
    state = read_state(tmp_path / "run" / "last.pt")["learner"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("settings_of", [Arbitration(at="feature"), Arbitration("amortised")], ids=lambda s: s.rule)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    people: Path,
    tmp_path: Path,
    teachers: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    settings_of: Arbitration,
) -> None:
    methods = Methods(hkd=Hierarchical(), noise=Noise(), mokd=settings_of)
    train(settings(people, tmp_path / "whole", teachers["dense"], methods))

    def cut(*_arguments: object) -> float:
        raise KeyboardInterrupt

    config = settings(people, tmp_path / "cut", teachers["dense"], methods)
    kept = runs.Run._set_rate
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "_set_rate", lambda self, step: cut() if step == 4 else kept(self, step))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    whole, resumed = (read_state(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for name, value in whole["learner"].items():
        assert torch.equal(value, resumed["learner"][name]), name
    assert whole["arbiter"] == resumed["arbiter"]
    assert [past["figures"] for past in whole["history"]] == [past["figures"] for past in resumed["history"]]
