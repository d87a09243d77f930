"""From the command's flags to a run: a new one, or one that goes on. Needs torch."""

import argparse
import sys
from pathlib import Path

from hkd_det.errors import DataError, UsageError
from hkd_det.imgsz import parse_imgsz
from hkd_det.models.sizes import spec_of
from hkd_det.train.checkpoint import read_state
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import train


def start(arguments: argparse.Namespace) -> int:
    """Train as `hkd-train`'s flags say; returns the exit code."""
    if arguments.resume:
        config = _resumed(Path(arguments.resume))
    else:
        config = _fresh(arguments)
    try:
        train(config, resume=bool(arguments.resume))
    except KeyboardInterrupt:
        if (config.run_dir / "last.pt").exists():
            print(
                f"hkd-train: the finished epochs are kept; go on with: hkd-train --resume {config.run}", file=sys.stderr
            )
        raise
    return 0


def _fresh(arguments: argparse.Namespace) -> TrainConfig:
    for flag in ("data", "model"):
        if not getattr(arguments, flag):
            raise UsageError(f"--{flag} is needed (or --resume RUN)")
    spec_of(arguments.model)
    run = arguments.name or f"{arguments.model}{'-' + arguments.distill if arguments.distill else ''}"
    config = TrainConfig(
        data=arguments.data,
        model=arguments.model,
        run=str(Path(arguments.project or "runs/train") / run),
        imgsz_hw=parse_imgsz(arguments.imgsz),
        epochs=arguments.epochs,
        batch=arguments.batch,
        backbone=arguments.backbone,
        pretrained=arguments.pretrained,
        teacher=arguments.teacher,
        distill=arguments.distill,
        device=arguments.device,
        workers=arguments.workers,
        seed=arguments.seed,
    ).with_settings(arguments.set)
    if (config.run_dir / "last.pt").exists() and not arguments.exist_ok:
        raise UsageError(
            f"{config.run_dir} already holds a run: --resume {config.run_dir} goes on with it, "
            "--name NAME starts another, --exist-ok starts over in its place"
        )
    return config


def _resumed(run_dir: Path) -> TrainConfig:
    path = run_dir if run_dir.suffix == ".pt" else run_dir / "last.pt"
    if not path.exists():
        raise DataError(f"--resume {run_dir}: no last.pt there; the run had not finished its first epoch")
    return TrainConfig.from_dict({**read_state(path)["config"], "run": str(path.parent)})
