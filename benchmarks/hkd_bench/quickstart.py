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
from hkd_bench.report import render_examples, write_bench_report
from hkd_bench.result import BenchResult, write_result
from hkd_bench.table import format_text_table
from hkd_deploy import open_detector
from hkd_deploy.demo.run import save_video
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.export.options import ExportOptions
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.synthetic import write_synthetic_dataset, write_video
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.methods import DistillConfig
from hkd_det.errors import run_command
from hkd_det.files import write_text
from hkd_det.letterbox import format_imgsz
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.train.config import TrainConfig
from hkd_det.train.engine import EpochRecord
from hkd_det.train.trainer import train

TEACHER, STUDENT_BASELINE, STUDENT_DISTILLED = "teacher", "student alone", "student distilled"
CONF = 0.3  # from which a box is drawn


@dataclass(frozen=True)
class QuickstartConfig:
    """The size of everything: chosen to fit two CPU cores and ten minutes."""

    num_train: int = 240
    num_val: int = 60
    imgsz_hw: tuple[int, int] = (256, 512)
    epochs: int = 12
    batch: int = 4
    runs: int = 100
    video_frames: int = 75


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-quickstart", _run_quickstart_cli, argv)


def run_quickstart(save_dir: Path, seed: int = 0, config: QuickstartConfig | None = None) -> BenchResult:
    """Do it all in `run_dir`; its `report.html` shows what came out. Drawn pictures are kept between calls."""
    config = config or QuickstartConfig()
    _log_step(1, f"drawing {config.num_train + config.num_val} pictures of a street")
    data = _write_street_dataset(save_dir, seed, config)
    histories: dict[str, list[EpochRecord]] = {}
    runs = {TEACHER: "teacher", STUDENT_BASELINE: "student", STUDENT_DISTILLED: "student-hkd"}
    for step, (name, folder) in enumerate(runs.items(), 2):
        _log_step(step, f"training: {name}")
        histories[name] = train(_make_train_config(name, save_dir, folder, data, seed, config)).history
    _log_step(5, "exporting to ONNX, checked against torch")
    samples = load_dataset(str(data), "val")
    models = []
    for folder in runs.values():
        model = save_dir / f"{folder}.onnx"
        checkpoint = load_detector_checkpoint(save_dir / folder / "best.pt")
        parity = export_detector(
            checkpoint, model, ExportOptions(config.imgsz_hw), [sample.path for sample in samples[:8]]
        )
        print(f"{model}: boxes within {parity.box_error_px:.2g} px, scores within {parity.score_error:.2g} of torch")
        models.append(model)
    _log_step(6, "measuring: miss rate, latency, memory")
    options = BenchOptions(
        data=str(data), split="val", runs=config.runs, command=_format_command(save_dir, seed, config)
    )
    result = bench(models, samples, options, names=list(runs))
    write_result(save_dir / "bench.json", result)
    _log_step(7, "the distilled student on a film")
    write_video(save_dir / "clip.mp4", seed=seed, num_frames=config.video_frames)
    film = save_dir / "film.mp4"
    save_video(models[-1], str(save_dir / "clip.mp4"), film, conf=CONF)
    _write_quickstart_report(save_dir, config, seed, result, histories, models, film)
    return result


def _run_quickstart_cli(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="hkd-quickstart", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the folder for all that comes out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=QuickstartConfig.epochs, help="of each of the three trainings")
    arguments = parser.parse_args(argv)
    result = run_quickstart(arguments.run, arguments.seed, QuickstartConfig(epochs=arguments.epochs))
    print(
        f"\n{format_text_table(result)}\n\nreport: {arguments.run / 'report.html'}   film: {arguments.run / 'film.mp4'}"
    )
    return 0


def _format_command(save_dir: Path, seed: int, config: QuickstartConfig) -> str:
    return shlex.join(["hkd-quickstart", "--run", str(save_dir), "--seed", str(seed), "--epochs", str(config.epochs)])


def _log_step(step: int, message: str) -> None:
    print(f"\n[{step}/7] {message}", flush=True)


def _write_street_dataset(save_dir: Path, seed: int, config: QuickstartConfig) -> Path:
    """The street on disk, in CityPersons' layout, and the yaml that names it."""
    write_synthetic_dataset(save_dir / "street", config.num_train, config.num_val, seed=seed)
    path = save_dir / "street.yaml"
    write_text(path, yaml.safe_dump({"format": "citypersons", "path": "street", "train": "train", "val": "val"}))
    return path


def _make_train_config(
    name: str, save_dir: Path, folder: str, data: Path, seed: int, config: QuickstartConfig
) -> TrainConfig:
    """The same schedule and seed for all three; only the model and the teacher differ."""
    taught = name == STUDENT_DISTILLED
    return TrainConfig(
        data=str(data),
        model="mini-teacher" if name == TEACHER else "mini-student",
        save_dir=str(save_dir / folder),
        imgsz_hw=config.imgsz_hw,
        epochs=config.epochs,
        batch=config.batch,
        # Few epochs: views close to what is measured teach faster than varied ones.
        mosaic=0.25,
        multi_scale=0.1,
        teacher=str(save_dir / "teacher" / "best.pt") if taught else "",
        distill=DistillConfig(hkd=HKDConfig()) if taught else DistillConfig(),
        device="cpu",
        seed=seed,
    )


def _write_quickstart_report(
    save_dir: Path,
    config: QuickstartConfig,
    seed: int,
    result: BenchResult,
    histories: dict[str, list[EpochRecord]],
    models: Sequence[Path],
    video_path: Path,
) -> None:
    samples = load_dataset(str(save_dir / "street.yaml"), "val")
    with open_detector(models[-1]) as detector:
        gallery = render_examples(detector, samples, conf=CONF, num_images=6)
    size = format_imgsz(config.imgsz_hw)
    write_bench_report(
        save_dir / "report.html",
        result,
        title="hkd-det quickstart",
        intro=(
            f"A teacher, a student trained alone and the same student distilled from the teacher, each for "
            f"{config.epochs} epochs on {config.num_train} drawn street pictures at {size} from random weights (seed "
            f"{seed}), measured on {config.num_val} others. The epoch kept is the one with the lowest miss rate on "
            "these same pictures, so the figures flatter all three alike; and pictures are drawn, not photographed: "
            "they show that the way works, not how well it works on a street."
        ),
        examples=gallery,
        training={
            name: [(record.epoch, record.miss_rate) for record in history] for name, history in histories.items()
        },
        video_frames=_read_video_frames(video_path, 3),
    )


def _read_video_frames(video_path: Path, num_frames: int) -> list[NDArray[np.uint8]]:
    """Frames spread over a film, uint8 RGB."""
    capture = cv2.VideoCapture(str(video_path))
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = []
        for index in np.linspace(0, total - 1, num_frames).astype(int):
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
            read, frame = capture.read()
            if read:
                frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8))
        return frames
    finally:
        capture.release()
