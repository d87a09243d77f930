"""`hkd-export`: a trained detector as one file that needs nothing but a runtime.

From weights (.pt) to ONNX on the machine that trains, which needs torch; from an ONNX file on to what a device wants,
on the device itself, which does not.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.backends import openvino_folder
from hkd_deploy.export.options import add_arguments, graph_options
from hkd_deploy.targets import command as targets
from hkd_deploy.trt import arguments as tensorrt
from hkd_det.datasets.catalogue import open_data
from hkd_det.errors import HkdError, UnavailableError, UsageError, run_command
from hkd_det.imgsz import format_imgsz

VERIFY_ON = 16  # pictures


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-export", _body, argv)


def _body(argv: Sequence[str] | None) -> int:
    flags = _parser().parse_args(argv)
    source = Path(flags.model)
    if flags.check and not flags.trt:
        raise UsageError("--check: belongs to --trt")
    if flags.trt and flags.target:
        raise UsageError("--trt --target: two steps; first --trt, then hkd-export MODEL.engine --target ...")
    match source.suffix:
        case ".pt":
            onnx = _onnx_of_weights(source, flags)
        case ".onnx" if flags.trt or flags.openvino or flags.target:
            onnx = source
        case ".engine" if flags.target:
            targets.write_targets(source, flags)
            return 0
        case ".onnx":
            raise UsageError(f"{source}: is ONNX already; say what to make of it: --trt, --openvino, --target")
        case _:
            raise UsageError(f"{source}: expected best.pt of a run, or an .onnx file of hkd-export")
    output = Path(flags.output) if flags.output and onnx == source else None
    if output and flags.trt and flags.openvino:
        raise UsageError(f"--output {output}: of --trt or of --openvino? ask for one at a time")
    if flags.trt:
        tensorrt.run(onnx, flags, output)
    if flags.openvino:
        openvino_folder.export_openvino(onnx, output)
    targets.write_targets(onnx, flags)
    return 0


def _onnx_of_weights(weights: Path, flags: argparse.Namespace) -> Path:
    """Write the ONNX file and say what was seen; its path."""
    try:
        from hkd_deploy.export.from_weights import export  # noqa: PLC0415 - torch, for this source only
        from hkd_deploy.export.onnx_file import write_onnx  # noqa: PLC0415
        from hkd_det.train.checkpoint import read_detector  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{error.name} is not installed; {weights} needs: pip install 'hkd-det[train]' "
            "(a device needs it not: export there from the .onnx file)"
        ) from None
    checkpoint = read_detector(weights)
    trained_hw = tuple(checkpoint.config["imgsz_hw"])
    options = graph_options(flags, (trained_hw[0], trained_hw[1]))
    path = Path(flags.output or weights.with_suffix(".onnx"))
    if path.suffix != ".onnx":
        raise UsageError(f"--output {path}: must end in .onnx")
    if flags.no_verify:
        write_onnx(checkpoint, path, options)
        verdict = "not compared with torch, as asked by --no-verify"
    else:
        parity = export(checkpoint, path, options, _pictures(flags.data or str(checkpoint.config["data"])))
        verdict = (
            f"agrees with torch on {parity.pictures} pictures: boxes within {parity.box_px:.2g} px, "
            f"scores within {parity.score:.2g}"
        )
    size = f"{format_imgsz(options.imgsz_hw)}, {path.stat().st_size / 2**20:.1f} MiB"
    print(f"{path}: {checkpoint.model}, {size}; {verdict}")
    return path


def _pictures(data: str) -> list[Path]:
    try:
        samples = open_data(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to verify on: {error} (or --data OTHER, or --no-verify)") from error
    return [sample.path for sample in samples[:VERIFY_ON]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-export", description=__doc__)
    parser.add_argument("model", help="best.pt of a run, or an .onnx file that hkd-export wrote")
    parser.add_argument("--output", help="the file to write; by default best.onnx beside the weights")
    parser.add_argument("--data", help="pictures to verify on; by default the training data's val split")
    parser.add_argument("--no-verify", action="store_true", help="do not compare with the trained detector")
    openvino_folder.add_arguments(parser)
    add_arguments(parser)
    tensorrt.add_arguments(parser)
    targets.add_arguments(parser)
    return parser
