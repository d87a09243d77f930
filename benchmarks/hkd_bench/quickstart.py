"""`hkd-quickstart`: the whole way on a synthetic street, from no pictures at all to a measured edge model.

Draws a street, trains a teacher and a student, distils a second student, exports all three, measures them,
runs the distilled one on a film, and leaves a report. The figures are what they are.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.gallery import judged_pictures
from hkd_bench.report import write_report
from hkd_bench.result import BenchResult, write_result
from hkd_bench.table import text_table
from hkd_deploy import open_detector
from hkd_deploy.demo.run import save_film
from hkd_deploy.export.from_weights import export
from hkd_deploy.export.options import GraphOptions
from hkd_det.datasets.catalogue import open_data
from hkd_det.datasets.synthetic import write_clip, write_street
from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.errors import run_command
from hkd_det.files import write_text
from hkd_det.imgsz import format_imgsz
from hkd_det.train.checkpoint import read_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import EpochRecord
from hkd_det.train.run import train

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"
CONF = 0.3  # from which a box is drawn


@dataclass(frozen=True)
class Plan:
    """The size of everything: chosen to fit two CPU cores and ten minutes."""

    training: int = 240
    validation: int = 60
    imgsz_hw: tuple[int, int] = (256, 512)
    epochs: int = 12
    batch: int = 4
    runs: int = 100
    film_frames: int = 75


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-quickstart", _body, argv)


def quickstart(run_dir: Path, seed: int = 0, plan: Plan | None = None) -> BenchResult:
    """Do it all in `run_dir`; its `report.html` shows what came out. Drawn pictures are kept between calls."""
    plan = plan or Plan()
    _say(1, f"drawing {plan.training + plan.validation} pictures of a street")
    data = _draw(run_dir, seed, plan)
    histories: dict[str, list[EpochRecord]] = {}
    runs = {TEACHER: "teacher", ALONE: "student", DISTILLED: "student-hkd"}
    for step, (name, folder) in enumerate(runs.items(), 2):
        _say(step, f"training: {name}")
        histories[name] = train(_config(name, run_dir, folder, data, seed, plan)).history
    _say(5, "exporting to ONNX, checked against torch")
    samples = open_data(str(data), "val")
    models = []
    for folder in runs.values():
        model = run_dir / f"{folder}.onnx"
        checkpoint = read_detector(run_dir / folder / "best.pt")
        parity = export(checkpoint, model, GraphOptions(plan.imgsz_hw), [sample.path for sample in samples[:8]])
        print(f"{model}: boxes within {parity.box_px:.2g} px, scores within {parity.score:.2g} of torch")
        models.append(model)
    _say(6, "measuring: miss rate, latency, memory")
    options = BenchOptions(data=str(data), split="val", runs=plan.runs, command=_command(run_dir, seed, plan))
    result = bench(models, samples, options, names=list(runs))
    write_result(run_dir / "bench.json", result)
    _say(7, "the distilled student on a film")
    write_clip(run_dir / "clip.mp4", seed=seed, frames=plan.film_frames)
    film = run_dir / "film.mp4"
    save_film(models[-1], str(run_dir / "clip.mp4"), film, conf=CONF)
    _write_page(run_dir, plan, seed, result, histories, models, film)
    return result


def _body(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="hkd-quickstart", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the folder for all that comes out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="of each of the three trainings")
    arguments = parser.parse_args(argv)
    result = quickstart(arguments.run, arguments.seed, Plan(epochs=arguments.epochs))
    print(f"\n{text_table(result)}\n\nreport: {arguments.run / 'report.html'}   film: {arguments.run / 'film.mp4'}")
    return 0


def _command(run_dir: Path, seed: int, plan: Plan) -> str:
    return shlex.join(["hkd-quickstart", "--run", str(run_dir), "--seed", str(seed), "--epochs", str(plan.epochs)])


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/7] {what}", flush=True)


def _draw(run_dir: Path, seed: int, plan: Plan) -> Path:
    """The street on disk, in CityPersons' layout, and the yaml that names it."""
    write_street(run_dir / "street", plan.training, plan.validation, seed=seed)
    path = run_dir / "street.yaml"
    write_text(path, yaml.safe_dump({"format": "citypersons", "path": "street", "train": "train", "val": "val"}))
    return path


def _config(name: str, run_dir: Path, folder: str, data: Path, seed: int, plan: Plan) -> TrainConfig:
    """The same schedule and seed for all three; only the model and the teacher differ."""
    taught = name == DISTILLED
    return TrainConfig(
        data=str(data),
        model="mini-teacher" if name == TEACHER else "mini-student",
        run=str(run_dir / folder),
        imgsz_hw=plan.imgsz_hw,
        epochs=plan.epochs,
        batch=plan.batch,
        # Few epochs: views close to what is measured teach faster than varied ones.
        mosaic=0.25,
        multi_scale=0.1,
        teacher=str(run_dir / "teacher" / "best.pt") if taught else "",
        distill=Methods(hkd=Hierarchical()) if taught else Methods(),
        device="cpu",
        seed=seed,
    )


def _write_page(
    run_dir: Path,
    plan: Plan,
    seed: int,
    result: BenchResult,
    histories: dict[str, list[EpochRecord]],
    models: Sequence[Path],
    film: Path,
) -> None:
    samples = open_data(str(run_dir / "street.yaml"), "val")
    with open_detector(models[-1]) as detector:
        gallery = judged_pictures(detector, samples, conf=CONF, count=6)
    size = format_imgsz(plan.imgsz_hw)
    write_report(
        run_dir / "report.html",
        result,
        title="hkd-det quickstart",
        intro=(
            f"A teacher, a student trained alone and the same student distilled from the teacher, each for "
            f"{plan.epochs} epochs on {plan.training} drawn street pictures at {size} from random weights (seed "
            f"{seed}), measured on {plan.validation} others. The epoch kept is the one with the lowest miss rate on "
            "these same pictures, so the figures flatter all three alike; and pictures are drawn, not photographed: "
            "they show that the way works, not how well it works on a street."
        ),
        gallery=gallery,
        training={
            name: [(record.epoch, record.miss_rate) for record in history] for name, history in histories.items()
        },
        film_frames=_frames(film, 3),
    )


def _frames(film: Path, count: int) -> list[NDArray[np.uint8]]:
    """Frames spread over a film, uint8 RGB."""
    capture = cv2.VideoCapture(str(film))
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = []
        for index in np.linspace(0, total - 1, count).astype(int):
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
            read, frame = capture.read()
            if read:
                frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8))
        return frames
    finally:
        capture.release()
