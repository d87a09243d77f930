"""The steps of the quickstart, from the synthetic images to the report. Requires torch."""

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
from hkd_deploy import open_detector
from hkd_deploy.demo.cli import save_video
from hkd_deploy.export.exporter import export_detector
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.synthetic import write_synthetic_dataset, write_video
from hkd_det.files import write_text
from hkd_det.letterbox import format_imgsz
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import EpochRecord
from hkd_det.train.trainer import train

TEACHER, STUDENT_BASELINE, STUDENT_DISTILLED = "teacher", "student baseline", "student distilled"
CONF = 0.3  # minimum score of a drawn box


@dataclass(frozen=True)
class QuickstartConfig:
    """Size of the quickstart. The defaults take 7 to 16 minutes on two CPU cores.

    Attributes:
        num_train: Number of training images.
        num_val: Number of validation images.
        imgsz_hw: Height and width of the model input, pixels. The images have twice this size by default.
        epochs: Epochs of each of the three training runs.
        batch: Batch size.
        runs: Timed runs per model.
        video_frames: Number of frames of the video.
    """

    num_train: int = 240
    num_val: int = 60
    imgsz_hw: tuple[int, int] = (256, 512)
    epochs: int = 12
    batch: int = 4
    runs: int = 100
    video_frames: int = 75


def run_quickstart(save_dir: Path, seed: int = 0, config: QuickstartConfig | None = None) -> BenchResult:
    """Run all steps and write `report.html`. Images that exist already are used again.

    Args:
        save_dir: Output directory.
        seed: Seed of the images and the training runs.
        config: Size of the quickstart.

    Returns:
        The measurements of the three models.
    """
    config = config or QuickstartConfig()
    _log_step(1, f"generate {config.num_train + config.num_val} images of a street")
    data = _write_street_dataset(save_dir, seed, config)
    histories: dict[str, list[EpochRecord]] = {}
    runs = {TEACHER: "teacher", STUDENT_BASELINE: "student", STUDENT_DISTILLED: "student-hkd"}
    for step, (name, folder) in enumerate(runs.items(), 2):
        _log_step(step, f"train: {name}")
        histories[name] = train(_make_train_config(name, save_dir, folder, data, seed, config)).history
    _log_step(5, "export to ONNX and compare with torch")
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
    _log_step(6, "measure miss rate, latency and memory")
    options = BenchOptions(
        data=str(data), split="val", runs=config.runs, command=_format_command(save_dir, seed, config)
    )
    result = bench(models, samples, options, names=list(runs))
    write_result(save_dir / "bench.json", result)
    _log_step(7, "run the distilled student on a video")
    write_video(save_dir / "clip.mp4", seed=seed, num_frames=config.video_frames)
    video_path = save_dir / "video.mp4"
    save_video(models[-1], str(save_dir / "clip.mp4"), video_path, conf=CONF)
    _write_quickstart_report(save_dir, config, seed, result, histories, models, video_path)
    return result


def _format_command(save_dir: Path, seed: int, config: QuickstartConfig) -> str:
    flags = {"--save-dir": save_dir, "--seed": seed, "--epochs": config.epochs}
    return shlex.join(["hkd-quickstart", *(str(word) for flag in flags.items() for word in flag)])


def _log_step(step: int, message: str) -> None:
    print(f"\n[{step}/7] {message}", flush=True)


def _write_street_dataset(save_dir: Path, seed: int, config: QuickstartConfig) -> Path:
    """Write the synthetic dataset in the CityPersons layout and its .yaml file; return the path of the latter."""
    write_synthetic_dataset(save_dir / "street", config.num_train, config.num_val, seed=seed)
    path = save_dir / "street.yaml"
    write_text(path, yaml.safe_dump({"format": "citypersons", "path": "street", "train": "train", "val": "val"}))
    return path


def _make_train_config(
    name: str, save_dir: Path, folder: str, data: Path, seed: int, config: QuickstartConfig
) -> TrainConfig:
    """Use the same schedule and seed for all three runs; only the model and the teacher differ."""
    is_distilled = name == STUDENT_DISTILLED
    return TrainConfig(
        data=str(data),
        model="mini-teacher" if name == TEACHER else "mini-student",
        save_dir=str(save_dir / folder),
        imgsz_hw=config.imgsz_hw,
        epochs=config.epochs,
        batch=config.batch,
        # Weak augmentation: with few epochs, images close to those of the validation set train faster.
        mosaic=0.25,
        multi_scale=0.1,
        teacher=str(save_dir / "teacher" / "best.pt") if is_distilled else "",
        distill={"hkd": {}} if is_distilled else {},
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
        examples = render_examples(detector, samples, conf=CONF, num_images=6)
    size = format_imgsz(config.imgsz_hw)
    write_bench_report(
        save_dir / "report.html",
        result,
        title="hkd-det quickstart",
        intro=(
            f"A teacher, a student trained without teacher, and the same student distilled from the teacher. Each was "
            f"trained for {config.epochs} epochs on {config.num_train} synthetic images at {size} from random weights "
            f"(seed {seed}) and measured on {config.num_val} others. The best epoch was selected on these same images, "
            "so the miss rates of all three are too low. The images are synthetic: the results demonstrate the "
            "workflow and not the accuracy on real images."
        ),
        examples=examples,
        training={
            name: [(record.epoch, record.miss_rate) for record in history] for name, history in histories.items()
        },
        video_frames=_read_video_frames(video_path, 3),
    )


def _read_video_frames(video_path: Path, num_frames: int) -> list[NDArray[np.uint8]]:
    """Read evenly spaced frames, uint8 RGB."""
    capture = cv2.VideoCapture(str(video_path))
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = []
        for index in np.linspace(0, total - 1, num_frames).astype(int):
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
            is_read, frame = capture.read()
            if is_read:
                frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8))
        return frames
    finally:
        capture.release()
