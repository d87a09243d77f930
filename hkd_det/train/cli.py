"""`hkd-train`: train a detector, alone or taught by another; or only get or check its data, without torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_det.datasets.download import download
from hkd_det.errors import UnavailableError, UsageError, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-train", _run_train_cli, argv)


def _run_train_cli(argv: Sequence[str] | None) -> int:
    arguments = _build_train_parser().parse_args(argv)
    if arguments.download:
        if not arguments.data:
            raise UsageError("--download needs --data NAME, a data set of datasets.yaml")
        download(arguments.data)
        if not (arguments.model or arguments.resume or arguments.check):
            print(f"Next: hkd-train --data {arguments.data} --check (look at it) or --model mini-student (train)")
            return 0
    if arguments.check:
        if not arguments.data:
            raise UsageError("--check needs --data, a data set of datasets.yaml or a data yaml")
        from hkd_det.datasets.check import check_dataset  # noqa: PLC0415 - matplotlib: not in a training's loading processes

        folder = Path(arguments.project or "runs/check") / (arguments.name or Path(arguments.data).stem)
        return check_dataset(arguments.data, folder)
    try:
        from hkd_det.train.start import start_training  # noqa: PLC0415 - torch is needed from here on
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed; training needs: pip install 'hkd-det[train]'") from None
    if arguments.list_layers:
        from hkd_det.train.start import print_feature_layers  # noqa: PLC0415 - torch, too

        return print_feature_layers(arguments)
    return start_training(arguments)


def _build_train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-train", description=__doc__)
    parser.add_argument("--data", help="a name in datasets.yaml, or a path to a data yaml")
    parser.add_argument("--download", action="store_true", help="first fetch --data, a name in datasets.yaml")
    parser.add_argument(
        "--check",
        action="store_true",
        help="train nothing: count what --data holds, tell everything that is wrong (then the exit code is 1), draw it",
    )
    parser.add_argument(
        "--list-layers",
        action="store_true",
        help="train nothing: show the layers of --model, --init or --teacher whose maps distillation can compare",
    )
    parser.add_argument("--recipe", default="", metavar="YAML", help="a whole run's settings; flags come on top")
    parser.add_argument(
        "--model",
        help="what to train: teacher-r50, student-r18, mini-teacher, mini-student, slim-student, fasterrcnn-r50, "
        "fasterrcnn-r18, or an Ultralytics model (yolo11n)",
    )
    parser.add_argument(
        "--weights", metavar="CHECKPOINT", help="start from a checkpoint's shape and weights; --model may be left out"
    )
    parser.add_argument("--teacher", help="best.pt of the teacher to learn from, or any detector's ONNX file")
    parser.add_argument(
        "--teacher-config",
        metavar="YAML",
        help="how to feed and read that ONNX file; else the .yaml beside it",
    )
    parser.add_argument(
        "--distill",
        metavar="METHODS",
        help="how to learn from it: hkd, soft_labels, noisy_teacher, mokd, blockwise, cdd, or several: hkd,noisy_teacher",
    )
    parser.add_argument(
        "--unlabeled", nargs="+", metavar="DIR", help="folders of pictures without labels, for the teacher to speak of"
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="also train the same student without the teacher, same seed and schedule: what did the teacher bring?",
    )
    parser.add_argument("--imgsz", help="input size, width x height, multiples of 32 (default: 640x512)")
    parser.add_argument("--epochs", type=int, help="default: 100")
    parser.add_argument("--batch", type=int, help="pictures a step, over all processes (default: 16)")
    parser.add_argument("--backbone", help="any timm model in the place of the size's own backbone")
    parser.add_argument("--pretrained", help="backbone weights: imagenet, or a file")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--workers", type=int, help="processes that load pictures (default: 2)")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--project", default="", help="folder of the runs: runs/train, or with --check runs/check")
    parser.add_argument("--name", default="", help="the run's folder in it; by default named by the model, or the data")
    parser.add_argument("--exist-ok", action="store_true", help="start over in a folder that holds a run")
    parser.add_argument("--resume", default="", metavar="RUN", help="go on with an interrupted run's folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of config.yaml"
    )
    return parser
