"""`hkd-export --verify`: its flags, and the pictures that forms are compared on.

`hkd-export`: a trained detector as one file that needs nothing but a runtime.

From weights (.pt) to ONNX on the machine that trains, which needs torch; from an ONNX file on to what a device wants,
on the device itself, which does not.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_deploy.export import openvino as openvino_folder
from hkd_deploy.export import options as graph
from hkd_deploy.export.parity import Reference, onnx_reference
from hkd_deploy.export.verify import ExportedModel, Verification
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision import cli as precision
from hkd_deploy.precision.report import list_onnx_backends
from hkd_deploy.serving import cli as serving
from hkd_deploy.trt import cli as tensorrt
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import HkdError, UnavailableError, UsageError, run_command
from hkd_det.letterbox import format_imgsz
from hkd_det.structures import Sample

NUM_PARITY_IMAGES = 16  # pictures


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of flags; --data is the command's own."""
    group = parser.add_argument_group("verification", "on --data's val split (docs/export/verification.md)")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare each form with what it was made of, and measure its miss rate; on unless --no-verify",
    )
    group.add_argument(
        "--verify-images", type=int, metavar="N", help="measure miss rates on N pictures; by default all"
    )


def check_verify_flags(flags: argparse.Namespace) -> None:
    """Raises UsageError for flags that make no sense."""
    if flags.verify_images is not None and flags.verify_images < 1:
        raise UsageError(f"--verify-images {flags.verify_images}: at least 1")


def build_verification(reference: Reference, data: str, flags: argparse.Namespace) -> Verification:
    """Parity on 16 pictures of a data set's val split, miss rates on --verify-images of it.

    Raises as `open_data` does, with what to do about it.
    """
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to verify on: {error} (or --data OTHER, or --no-verify)") from error
    pictures = [sample.path for sample in _select_evenly(samples, NUM_PARITY_IMAGES)]
    return Verification(reference, pictures, _select_evenly(samples, flags.verify_images or len(samples)), data)


def build_onnx_verification(onnx: Path, flags: argparse.Namespace) -> Verification | None:
    """Against an ONNX file itself; None with --no-verify.

    A device has seldom the data that a detector was trained on: where nobody has said --verify or --data, a line says
    that nothing is verified. Raises as reading the file and the data does.
    """
    if flags.verify is False:
        return None
    source = read_onnx_file(onnx)
    try:
        data = flags.data or ModelMetadata.from_metadata(source.metadata, onnx).data
        return build_verification(onnx_reference(onnx), data, flags)
    except HkdError as error:
        if flags.verify or flags.data:
            raise
        print(f"hkd-export: not verified: {error}", file=sys.stderr)
        return None


def _select_evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of them, evenly over all."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[place] for place in places]


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    # `docker stop`, `timeout` and the like leave no more behind than Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command("hkd-export", _run_export, argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_export(argv: Sequence[str] | None) -> int:
    parser = _build_parser()
    flags = parser.parse_args(argv)
    source, output = Path(flags.model), Path(flags.output) if flags.output else None
    _check_unused_flags(source, parser, flags)
    _check_flags(source, output, flags)
    if source.suffix == ".engine":
        serving.write_serving_folders(source, flags)
        return 0
    smaller = flags.precision != "fp32"
    onnx_output, engine_output, folder_output = _split_output_by_suffix(output)
    verification = None
    known: precision.MissRates = {}
    onnx = source
    if source.suffix == ".pt":
        # --output names what was asked for; an FP32 file on the way to a smaller one keeps its usual name.
        onnx, verification = _export_weights(source, None if smaller else onnx_output, flags)
    if smaller:
        onnx, known = precision.write_precision(onnx, onnx_output, flags)
    engine = tensorrt.run_trt(onnx, flags, engine_output) if flags.trt else None
    if source.suffix == ".onnx" and (smaller or engine or flags.openvino):
        verification = build_onnx_verification(source, flags)
    if smaller:
        _verify_reduced_model(onnx, flags.precision, verification)
    if engine and verification:
        # Not exact: TensorRT multiplies FP32 in TF32, which keeps 10 bits, on every GPU since Ampere.
        verification.add(ExportedModel(engine, "tensorrt", is_exact=False, device=tensorrt.get_build_device(flags)))
    elif flags.trt and verification:
        verification.skip(ExportedModel(onnx.with_suffix(".engine"), "tensorrt", is_exact=False), "--dry-run writes none")
    if flags.openvino:
        _write_openvino(onnx, folder_output, verification)
    if verification:
        print(verification.format_table({} if flags.verify_images else known))
    serving.write_serving_folders(onnx, flags)
    return 0


def _verify_reduced_model(onnx: Path, precision_name: str, verification: Verification | None) -> None:
    """Compare a file of --precision on every runtime that is installed."""
    if verification and precision_name == "bf16":
        verification.skip(ExportedModel(onnx, "onnxruntime", is_exact=False), precision.BF16_SKIP_REASON)
    elif verification:
        for backend in list_onnx_backends("cpu"):
            verification.add(ExportedModel(onnx, backend, is_exact=False))


def _write_openvino(onnx: Path, output: Path | None, verification: Verification | None) -> None:
    exact = read_onnx_file(onnx).precision == "fp32"

    def check(folder: Path, aside: Path) -> None:
        if verification:
            verification.add(ExportedModel(folder, "openvino", exact), aside)

    openvino_folder.export_openvino(onnx, output, check)


def _check_flags(source: Path, output: Path | None, flags: argparse.Namespace) -> None:
    """What would otherwise show only after a file or two have been written."""
    check_verify_flags(flags)
    if source.suffix not in (".pt", ".onnx", ".engine"):
        raise UsageError(f"{source}: expected best.pt of a run, or an .onnx file of hkd-export")
    if source.suffix == ".engine" and (not flags.serving or flags.precision != "fp32" or flags.openvino):
        raise UsageError(f"{source}: is an engine already; only --serving makes something of it")
    if source.suffix == ".onnx" and not (flags.precision != "fp32" or flags.trt or flags.openvino or flags.serving):
        raise UsageError(
            f"{source}: is ONNX already; say what to make of it: --precision, --trt, --openvino, --serving"
        )
    for name, odd in (("--raw", flags.raw), ("--no-preprocess", flags.no_preprocess)):
        if odd and (flags.precision != "fp32" or flags.openvino):
            raise UsageError(f"{name}: for a program of your own; --precision can't judge it, --openvino can't open it")
    if flags.trt and flags.serving:
        raise UsageError("--trt --serving: two steps; first --trt, then hkd-export MODEL.engine --serving ...")
    if flags.trt:
        tensorrt.make_build_options(flags)
    onnx, engine, folder = _split_output_by_suffix(output)
    if onnx and source.suffix != ".pt" and flags.precision == "fp32":
        raise UsageError(f"--output {output}: no .onnx file is written of {source}, unless by --precision")
    if engine and (not flags.trt or flags.dry_run):
        raise UsageError(f"--output {output}: an engine is written by --trt, without --dry-run")
    if folder and not flags.openvino:
        raise UsageError(f"--output {output}: must end in .onnx, or in .engine with --trt; a folder is for --openvino")


def _check_unused_flags(source: Path, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Raises UsageError for a flag that nothing here would listen to."""
    for heard, names, why in (
        (source.suffix == ".pt", graph.FLAGS, f"{source} is finished; give the best.pt that it was made of"),
        (flags.precision != "fp32", precision.FLAGS, "belongs to --precision"),
        (flags.trt, tensorrt.FLAGS, "belongs to --trt"),
        (bool(flags.serving), serving.SERVING_FLAGS, "belongs to --serving"),
    ):
        for name in () if heard else names:
            if getattr(flags, name) != parser.get_default(name):
                raise UsageError(f"--{name.replace('_', '-')}: {why}")


def _split_output_by_suffix(output: Path | None) -> tuple[Path | None, Path | None, Path | None]:
    """--output as the ONNX file, the engine or the OpenVINO folder that it names by its ending."""
    match output.suffix if output else None:
        case None:
            return None, None, None
        case ".onnx":
            return output, None, None
        case ".engine":
            return None, output, None
        case _:
            return None, None, output


def _export_weights(weights: Path, output: Path | None, flags: argparse.Namespace) -> tuple[Path, Verification | None]:
    """Write the ONNX file and say what it is; its path, and what compares further forms with the weights."""
    try:
        from hkd_deploy.export.exporter import (  # noqa: PLC0415 - torch, only here
            export_and_verify,
            export_onnx,
            torch_reference,
        )
        from hkd_det.models.checkpoint import load_detector_checkpoint  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{error.name} is not installed; {weights} needs: pip install 'hkd-det[train]' "
            "(a device needs it not: export there from the .onnx file)"
        ) from None
    checkpoint = load_detector_checkpoint(weights)
    trained_hw = tuple(checkpoint.config["imgsz_hw"])
    options = graph.make_export_options(flags, (trained_hw[0], trained_hw[1]))
    path = output or weights.with_suffix(".onnx")
    verification = None
    if flags.verify is False:
        export_onnx(checkpoint, path, options)
        verdict = "; not compared with torch, as asked by --no-verify"
    else:
        reference = torch_reference(checkpoint, str(weights), options)
        verification = build_verification(reference, flags.data or str(checkpoint.config["data"]), flags)
        export_and_verify(checkpoint, path, options, verification)
        verdict = ""
    print(
        f"{path}: {checkpoint.model}, {format_imgsz(options.imgsz_hw)}, {path.stat().st_size / 2**20:.1f} MiB{verdict}"
    )
    return path, verification


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-export", description=__doc__)
    parser.add_argument("model", help="best.pt of a run, or an .onnx file that hkd-export wrote")
    parser.add_argument("--output", help="the file to write; by default best.onnx beside the weights")
    parser.add_argument(
        "--data", help="data set to verify and judge on, its val split; by default what it was trained on"
    )
    graph.add_arguments(parser)
    precision.add_arguments(parser)
    tensorrt.add_arguments(parser)
    openvino_folder.add_arguments(parser)
    serving.add_arguments(parser)
    add_verify_arguments(parser)
    return parser
