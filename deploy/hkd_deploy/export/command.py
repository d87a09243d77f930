"""`hkd-export`: a trained detector as one file that needs nothing but a runtime.

From weights (.pt) to ONNX on the machine that trains, which needs torch; from an ONNX file on to what a device wants,
on the device itself, which does not.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.export.options import add_arguments, graph_options
from hkd_deploy.precision import command as precision
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
    match source.suffix:
        case ".pt":
            fp32 = _onnx_of_weights(source, flags)
        case ".onnx" if flags.precision == "fp32":
            raise UsageError(f"{source}: is ONNX already; say what to make of it (--precision fp16, bf16 or int8)")
        case ".onnx":
            fp32 = source
        case _:
            raise UsageError(f"{source}: expected best.pt of a run, or an .onnx file of hkd-export")
    if flags.precision != "fp32":
        precision.write_precision(fp32, flags)
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
    # --output names what was asked for; the FP32 file is then only what it is made of.
    named = flags.output if flags.precision == "fp32" else None
    path = Path(named or weights.with_suffix(".onnx"))
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
    print(
        f"{path}: {checkpoint.model}, {format_imgsz(options.imgsz_hw)}, {path.stat().st_size / 2**20:.1f} MiB; {verdict}"
    )
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
    add_arguments(parser)
    precision.add_arguments(parser)
    return parser
