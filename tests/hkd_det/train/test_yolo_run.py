"""Whole small runs with a YOLO model as student and as teacher, our detectors on the other side."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import Noise
from hkd_det.distill.tap_choice import TapNames
from hkd_det.errors import DataError
from hkd_det.models import sizes
from hkd_det.models.detector import Detector, DetectorSpec
from hkd_det.models.yolo import YoloDetector, YoloSpec, yolo_spec
from hkd_det.train.checkpoint import DetectorCheckpoint, read_detector, read_state, write_detector
from hkd_det.train.command import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import Run, train
from hkd_det.train.teachers import open_teacher

TINY = DetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TERMS = {"hkd_pyramid", "hkd_region", "hkd_score", "hkd_box"}


def thin(name: str, classes: int = 1) -> YoloSpec:
    layout = deepcopy(yolo_spec(name).layout)
    layout["scales"][layout["scale"]][1] = 0.0625
    return YoloSpec(name, {**layout, "nc": classes})


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "mini-student", TINY)
    for name in ("yolov8n", "yolo11n", "yolo26n"):
        monkeypatch.setitem(sizes.SIZES, name, thin(name))  # type: ignore[arg-type]


def settings(people: Path, run: Path, model: str, teacher: Path | None, **changes: object) -> TrainConfig:
    taught = {"teacher": str(teacher), "distill": Methods(hkd=Hierarchical())} if teacher else {}
    values: dict[str, object] = {
        "data": str(people), "model": model, "run": str(run), "imgsz_hw": (64, 96), "epochs": 2, "batch": 4,
        "workers": 0, "device": "cpu", "finale": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **taught, **changes})  # type: ignore[arg-type]


def our_teacher(path: Path) -> Path:
    torch.manual_seed(3)
    write_detector(path, DetectorCheckpoint("tiny", TINY, Detector(TINY).state_dict(), {}, 1, 1.0))
    return path


@pytest.mark.usefixtures("tiny_sizes")
@pytest.mark.parametrize(("name", "own"), [("yolo11n", "distribution"), ("yolo26n", "box_one")])
def test_a_yolo_student_learns_from_our_teacher_and_teaches_ours(
    people: Path, tmp_path: Path, name: str, own: str
) -> None:
    taught = train(settings(people, tmp_path / "yolo", name, our_teacher(tmp_path / "teacher.pt")))
    assert taught.history[0].losses.keys() >= TERMS | {"score", "box", own}
    best = read_detector(taught.best)
    assert best.spec == thin(name) and isinstance(best.build(), YoloDetector)
    back = train(settings(people, tmp_path / "ours", "mini-student", taught.best))
    assert back.history[0].losses.keys() >= TERMS
    assert isinstance(read_detector(back.best).build(), Detector)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_sizes")
def test_chosen_taps_and_noise_teach_across_families_both_ways_and_resume_exactly(people: Path, tmp_path: Path) -> None:
    """Run whole, and again from an epoch's end: noise is drawn by the epoch."""
    yolo = train(settings(people, tmp_path / "yolo", "yolo11n", None, epochs=1)).best
    ours, theirs = ("backbone.body.layer3", "neck.outputs.0"), ("network.model.16", "network.model.22")
    for model, teacher, taps in (
        ("yolo11n", our_teacher(tmp_path / "teacher.pt"), TapNames(theirs, ours)),
        ("mini-student", yolo, TapNames(ours, theirs)),
    ):
        taught = {"distill": Methods(hkd=Hierarchical(taps=taps), noise=Noise())}
        config = settings(people, tmp_path / model, model, teacher, **taught)
        assert train(config).history[-1].losses.keys() >= TERMS | {"noise"}
    cut = replace(config, run=str(tmp_path / "cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_set_rate", stop_at(5, Run._set_rate))  # in the second epoch's third step
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(cut, resume=True)
    whole, resumed = (read_state(one.run_dir / "last.pt")["learner"] for one in (config, cut))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def stop_at(step: int, kept: Callable[[Run, int], None]) -> Callable[[Run, int], None]:
    def set_rate(run: Run, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt
        kept(run, at)

    return set_rate


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_sizes")
def test_a_yolo_student_learns_to_find_dark_boxes(people: Path, tmp_path: Path) -> None:
    plain = {"mosaic": 0.0, "multi_scale": 0.0, "ema_decay": 0.9}
    course = train(settings(people, tmp_path, "yolov8n", None, epochs=20, lr=1e-2, **plain))
    assert course.history[-1].losses["box"] < 0.6 * course.history[0].losses["box"]
    assert course.miss_rate < 0.5


@pytest.mark.usefixtures("tiny_sizes")
def test_an_ultralytics_file_teaches_our_student(people: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = YoloDetector(thin("yolo11n", 3)).network
    network.names = {0: "person", 1: "dog", 2: "car"}
    torch.save({"model": network}, tmp_path / "yolo11n.pt")
    flags = [
        "--data", str(people), "--model", "mini-student", "--teacher", str(tmp_path / "yolo11n.pt"), "--distill", "hkd",
        "--imgsz", "96x64", "--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu",
        "--project", str(tmp_path), "--name", "run",
    ]  # fmt: skip
    assert main(flags) == 0
    assert "hkd_pyramid" in (tmp_path / "run" / "results.csv").read_text()


def test_a_teacher_is_told_by_what_its_file_holds(tmp_path: Path) -> None:
    assert isinstance(open_teacher(our_teacher(tmp_path / "teacher.pt")), Detector)
    with pytest.raises(DataError, match=r"nothing\.pt: no such checkpoint"):
        open_teacher(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(DataError, match=r"text\.pt: not a readable checkpoint"):
        open_teacher(tmp_path / "text.pt")
