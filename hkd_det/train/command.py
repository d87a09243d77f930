"""`hkd-train`: train a detector, alone or taught by another."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hkd_det.errors import DataError, UsageError, run_command
from hkd_det.imgsz import parse_imgsz
from hkd_det.models.sizes import SIZES, spec_of
from hkd_det.train.checkpoint import read_state
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import train


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-train", _body, argv)


def _body(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
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
        run=str(Path(arguments.project) / run),
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-train", description=__doc__)
    parser.add_argument("--data", help="a name in datasets.yaml, or a path to a data yaml")
    parser.add_argument("--model", help=f"what to train: {', '.join(SIZES)}")
    parser.add_argument("--teacher", default="", help="best.pt of the teacher to learn from")
    parser.add_argument("--distill", default="", help="how to learn from it: hkd")
    parser.add_argument("--imgsz", default="640x512", help="input size, width x height, multiples of 32")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step, over all processes")
    parser.add_argument("--backbone", default="", help="any timm model in the place of the size's own backbone")
    parser.add_argument("--pretrained", default="", help="backbone weights: imagenet, or a file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=2, help="processes that load pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--project", default="runs/train", help="folder of the runs")
    parser.add_argument("--name", default="", help="the run's folder in it; by default named by the model")
    parser.add_argument("--exist-ok", action="store_true", help="start over in a folder that holds a run")
    parser.add_argument("--resume", default="", metavar="RUN", help="go on with an interrupted run's folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of config.yaml"
    )
    return parser
