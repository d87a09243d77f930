"""`hkd-train`: train a detector, alone or with distillation; download, validate or describe its inputs.

Torch is imported only to train or to list layers, and packages of extras only where they are used.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hkd_det import __version__
from hkd_det.config import check_range
from hkd_det.distill import METHODS
from hkd_det.errors import UsageError, require_extra, run_command
from hkd_det.train.settings import AUTO_BATCH, MODEL_NAMES, check_resume_flags, merge_settings, parse_with_peer_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        Exit code.
    """
    return run_command("hkd-train", _run_train_cli, argv)


def _run_train_cli(argv: Sequence[str] | None) -> int:
    arguments = parse_with_peer_flags(_build_train_parser(), argv)
    if arguments.download:
        if not arguments.data:
            raise UsageError("--download: requires --data NAME. Choose a dataset of datasets.yaml.")
        with require_extra("bench"):
            from hkd_det.datasets.download import download  # noqa: PLC0415 - imports packages of the extra
        download(arguments.data)
        if not (arguments.model or arguments.resume or arguments.check):
            data = shlex.quote(arguments.data)
            print(f"Next: hkd-train --data {data} --check (validate it) or --model mini-student (train)")
            return 0
    if arguments.check:
        return _run_check(arguments)
    for flag in (
        "check_images",
        "json",
        "audit",
        "audit_config",
        "audit_score",
        "write_audited",
        "audited_as",
        "against",
    ):
        if getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')}: requires --check. Add --check.")
    settings: dict[str, Any] = {}
    if arguments.resume:
        check_resume_flags(arguments)
    elif not arguments.list_layers:
        settings = merge_settings(arguments)
    with require_extra("train"):
        from hkd_det.train import start  # noqa: PLC0415 - imports torch
    if arguments.list_layers:
        return start.print_feature_layers(arguments)
    return start.start_training(arguments, settings)


def _run_check(arguments: argparse.Namespace) -> int:
    # Not in the processes that load images.
    from hkd_det.datasets.audit_run import AuditOptions  # noqa: PLC0415
    from hkd_det.datasets.check import check_dataset  # noqa: PLC0415
    from hkd_det.datasets.check_report import choose_report_dir  # noqa: PLC0415
    from hkd_det.datasets.image_page import DEFAULT_MAX_IMAGES  # noqa: PLC0415

    if not arguments.data:
        raise UsageError("--check: requires --data. Choose a dataset of datasets.yaml, or a data YAML file.")
    project = Path(arguments.project or "runs/check")
    directory = project / arguments.name if arguments.name else choose_report_dir(project, arguments.data)
    max_images = DEFAULT_MAX_IMAGES if arguments.check_images is None else arguments.check_images
    options = (arguments.against or [], arguments.json or "", max_images)
    if arguments.audit is None:
        for flag in ("audit_config", "audit_score", "write_audited", "audited_as"):
            if getattr(arguments, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')}: requires --audit. Add --audit MODEL.")
        return check_dataset(arguments.data, directory, None, *options)
    if arguments.audited_as and not arguments.write_audited:
        raise UsageError("--audited-as: requires --write-audited. Add --write-audited FILE.")
    score = {} if arguments.audit_score is None else {"min_score": arguments.audit_score}
    check_range("--audit-score", score.get("min_score", 1), 0, 1, is_open=True)
    configs = arguments.audit_config.split(",") if arguments.audit_config else []
    audit = AuditOptions(
        models=tuple(Path(name.strip()) for name in arguments.audit.split(",")),
        config_paths=tuple(Path(name.strip()) if name.strip() else None for name in configs),
        device="cpu" if arguments.device in (None, "auto") else arguments.device,
        write_audited=arguments.write_audited or "",
        audited_as=arguments.audited_as or "ignore",
        **score,
    )
    return check_dataset(arguments.data, directory, audit, *options)


def _build_train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hkd-train",
        description="Train a pedestrian detector, alone or with distillation from a teacher.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--data",
        help="dataset: a name in datasets.yaml, a data YAML, a COCO file, or a directory or archive of a labeling tool",
    )
    parser.add_argument("--download", action="store_true", help="download --data, a name in datasets.yaml, first")
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate the dataset and exit: print statistics and annotation errors, save preview images; exit code 1 "
        "on errors",
    )
    _add_audit_arguments(parser)
    parser.add_argument(
        "--list-layers",
        action="store_true",
        help="list the feature layers of --model, --weights or --teacher that distillation can compare, and exit",
    )
    parser.add_argument("--recipe", default="", metavar="YAML", help="settings of a run; other flags override them")
    parser.add_argument(
        "--model",
        help=f"model to train: {', '.join(MODEL_NAMES)}, or an Ultralytics model such as yolo11n",
    )
    parser.add_argument(
        "--weights",
        metavar="CHECKPOINT",
        help="initial architecture and weights: best.pt of a run, a shipped detector such as hkd-cpu, an .onnx file of "
        "hkd-export with YOLOX in FP32, or a YOLOX file of Megvii (.pth, .onnx); --model can be left out. Without "
        "--model, --weights and --recipe, hkd-cpu is fine-tuned; with --teacher only if --unlabeled is set",
    )
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights also without --model")
    parser.add_argument(
        "--teacher",
        help="teacher: best.pt of a run, a shipped detector, an Ultralytics .pt file, an ONNX or OpenVINO model, or a "
        "YAML file that lists several such models",
    )
    parser.add_argument(
        "--teacher-config",
        metavar="YAML",
        help="input and output format of an ONNX or OpenVINO teacher: a YAML file, or a name such as yolox (default: "
        "recognized, or the .yaml file next to it)",
    )
    parser.add_argument(
        "--distill",
        metavar="METHODS",
        help=f"distillation methods, comma-separated: {', '.join(METHODS)}; requires --teacher",
    )
    parser.add_argument(
        "--unlabeled",
        nargs="+",
        metavar="DIR",
        help="directories of unlabeled images; the teacher generates soft labels for them",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="also train the same student without the teacher, same seed and schedule, and print the difference",
    )
    parser.add_argument("--imgsz", help="input size in pixels, WIDTHxHEIGHT, multiples of 32 (default: 640x512)")
    parser.add_argument("--epochs", type=int, help="number of epochs (default: 100)")
    parser.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="end the run after N epochs without a lower miss rate (default: 0, never)",
    )
    parser.add_argument(
        "--batch",
        type=_parse_batch,
        help="images per step, over all processes; auto fills 70 %% of the free GPU memory (default: 16)",
    )
    parser.add_argument("--backbone", help="timm model that replaces the backbone of --model")
    parser.add_argument("--pretrained", help="backbone weights: imagenet, or a file")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or N (default: auto)")
    parser.add_argument("--workers", type=int, help="processes that load images (default: 2)")
    parser.add_argument("--seed", type=int, help="random seed (default: 0)")
    parser.add_argument(
        "--project", default="", help="parent directory of the run (default: runs/train, with --check runs/check)"
    )
    parser.add_argument(
        "--name", default="", help="directory of the run in --project (default: model and methods, or the dataset)"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        default=None,
        help="also write the values of results.csv for TensorBoard; requires the extra tensorboard",
    )
    parser.add_argument("--exist-ok", action="store_true", help="replace an earlier run in the same directory")
    parser.add_argument("--resume", default="", metavar="RUN", help="directory of an interrupted run to continue")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any other setting of config.yaml, such as lr=1e-3 or distill.METHOD.KEY=1; repeatable",
    )
    return parser


def _parse_batch(text: str) -> int | str:
    if text in (AUTO_BATCH, "-1"):  # -1 is the spelling of Ultralytics
        return AUTO_BATCH
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of images or auto, got {text}")
    return int(text)


def _parse_image_limit(text: str) -> int:
    if text == "all":
        return sys.maxsize
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of images or all, got {text}")
    return int(text)


def _add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check-images",
        type=_parse_image_limit,
        metavar="N",
        help="with --check: maximum number of images in images.html, those with problems first; all for all images, 0 "
        "for no such page (default: 10000)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="with --check: write counts, unused classes and problems of each split as JSON; - writes to stdout",
    )
    parser.add_argument(
        "--against",
        action="append",
        metavar="DATA",
        help="with --check: also report images of --data that are near-duplicates of images of this dataset, such as a "
        "test set; repeatable",
    )
    parser.add_argument(
        "--audit",
        metavar="MODEL[,MODEL...]",
        help="with --check: run ONNX or OpenVINO detectors over the images and report probable missing labels, badly "
        "placed boxes, improbable labels and rotated images. See --audit-config for models of other tools",
    )
    parser.add_argument(
        "--audit-config",
        metavar="YAML[,YAML...]",
        help="input and output format of each model of --audit, in their order: a YAML file, or a name such as yolox "
        "(default: recognized, or the .yaml file next to it)",
    )
    parser.add_argument(
        "--audit-score", type=float, metavar="SCORE", help="minimum score of a probable missing label (default: 0.3)"
    )
    parser.add_argument(
        "--write-audited",
        metavar="FILE",
        help="with --audit: write the annotations and the missing people as a COCO file. {split} in FILE is the name "
        "of the split; without it, several splits are FILE_SPLIT",
    )
    parser.add_argument(
        "--audited-as",
        choices=("ignore", "label", "detections"),
        help="add missing people as ignore regions, or as labels (score from 0.5) and ignore regions; detections: as "
        "label, without the annotations of the dataset (default: ignore)",
    )


if __name__ == "__main__":  # torchrun -m hkd_det.train.cli
    raise SystemExit(main())
