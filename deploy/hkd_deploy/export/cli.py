"""Command `hkd-export`: convert a trained detector to a file for a runtime."""

import argparse
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.backends.openvino import export_openvino
from hkd_deploy.export.verify import (
    ExportedModel,
    Verification,
    add_verify_arguments,
    build_onnx_verification,
    build_verification,
)
from hkd_deploy.external import is_external_model
from hkd_deploy.model_metadata import ExportOptions, ModelMetadata
from hkd_deploy.precision import cli as precision
from hkd_deploy.precision.model import list_onnx_backends
from hkd_deploy.serving import writers as serving
from hkd_deploy.trt import cli as tensorrt
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det import __version__
from hkd_det.config import check_range
from hkd_det.errors import UnavailableError, UsageError, run_command
from hkd_det.files import atomic_write, file_sha256
from hkd_det.letterbox import format_imgsz, parse_imgsz
from hkd_det.shipped import resolve_model

DEFAULT_MAX_IMGSZ = "1920x1080"  # Full HD, the largest image of most cameras
DYNAMIC_CHOICES = ("batch", "size")
GRAPH_FLAGS = ("imgsz", "batch", "dynamic", "letterbox", "max_imgsz", "no_preprocess", "raw")  # require weights
DESCRIPTION = (
    "Convert a trained detector to a file for a runtime. Weights (.pt) are exported to an ONNX file; this requires "
    "torch. So are the weights in an ONNX file of a YOLOX model, such as hkd-cpu, with flags of the graph. "
    "All other conversions read an ONNX file and need no torch, so they also run on the target device: reduced "
    "precision, TensorRT engine, OpenVINO directory, files for an inference server."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments. None for those of the process.

    Returns:
        The exit code.
    """
    # Treat SIGTERM (docker stop, timeout) like Ctrl-C, so that temporary files are removed.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command("hkd-export", _run_export, argv)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-export", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "model",
        help="best.pt of a training run, an .onnx file of hkd-export, a shipped model such as hkd-cpu (copied to the "
        "working directory), an .engine file (with --serving), or an .onnx file of another tool (with --precision)",
    )
    parser.add_argument("--output", help="file or OpenVINO directory to write (default: next to the model)")
    parser.add_argument(
        "--data", help="dataset whose val split is used for verification and evaluation (default: training dataset)"
    )
    _add_graph_arguments(parser)
    precision.add_arguments(parser)
    tensorrt.add_arguments(parser)
    group = parser.add_argument_group("OpenVINO")
    group.add_argument(
        "--openvino", action="store_true", help="write an OpenVINO directory (default name: NAME_openvino)"
    )
    serving.add_arguments(parser)
    add_verify_arguments(parser)
    return parser


def _add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("graph", "require weights (.pt) or an .onnx file of a YOLOX model in FP32")
    group.add_argument(
        "--imgsz", metavar="WxH", help="input size, width x height, multiples of 32 (default: training size)"
    )
    group.add_argument("--batch", type=int, metavar="N", help="images per batch (default: 1)")
    group.add_argument(
        "--dynamic",
        nargs="?",
        const="batch",
        metavar="batch,size",
        type=_parse_dynamic,
        default=(),
        help="dynamic axes: batch (also without a value), size (any size up to --imgsz), or both",
    )
    group.add_argument(
        "--letterbox",
        action="store_true",
        help="resize images of any size in the graph and return boxes in image pixels",
    )
    group.add_argument(
        "--max-imgsz",
        metavar="WxH",
        help=f"largest image, width x height (default: {DEFAULT_MAX_IMGSZ}); requires --letterbox",
    )
    group.add_argument(
        "--no-preprocess", action="store_true", help="float32 RGB input (B, 3, H, W), 0 to 1, instead of uint8"
    )
    group.add_argument(
        "--raw", action="store_true", help="output boxes and logits of all candidates, for a custom decoder"
    )


def _run_export(argv: Sequence[str] | None) -> int:
    parser = _build_parser()
    flags = parser.parse_args(argv)
    model, output = resolve_model(flags.model), Path(flags.output) if flags.output else None
    is_shipped = model != Path(flags.model)
    source = Path(model.name) if is_shipped else model
    # Flags of the graph build the graph of an .onnx file again from its weights.
    graph_flags = _list_graph_flags(parser, flags)
    has_weights = source.suffix == ".pt" or (source.suffix == ".onnx" and bool(graph_flags))
    _check_unused_flags(source, parser, flags)
    _check_source(source, has_weights, flags)
    _check_combinations(flags)
    _check_output(source, output, has_weights, flags)
    if is_shipped:
        _copy_shipped_model(model, source)
    if source.suffix == ".engine":
        serving.write_serving_folders(source, flags)
        return 0
    if (
        source.suffix == ".onnx" and flags.openvino and not has_weights
    ):  # here, because the verification reports the same problem as a note
        ModelMetadata.from_metadata(read_onnx_file(source).metadata, source)
    is_reduced = flags.precision != "fp32"
    onnx_output, engine_output, folder_output = _split_output_by_suffix(output)
    verification = None
    miss_rates: precision.MissRates = {}
    onnx_path = source
    if has_weights:
        # With --precision, --output names the converted file; the FP32 file keeps its default name.
        onnx_path, verification = _export_weights(source, None if is_reduced else onnx_output, flags, graph_flags)
    if is_reduced:
        onnx_path, miss_rates = precision.convert_precision(onnx_path, onnx_output, flags)
    engine_path = tensorrt.run_trt(onnx_path, flags, engine_output) if flags.trt else None
    if not has_weights and (is_reduced or engine_path or flags.openvino) and not is_external_model(source):
        verification = build_onnx_verification(source, flags)
    if verification and is_reduced:
        _verify_reduced_model(onnx_path, flags.precision, verification)
    if verification and flags.trt:
        _verify_engine(onnx_path, engine_path, verification, flags)
    if flags.openvino:
        _write_openvino(onnx_path, folder_output, verification)
    if verification:
        print(verification.format_table({} if flags.verify_images else miss_rates))
    serving.write_serving_folders(onnx_path, flags)
    return 0


def _list_graph_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> list[str]:
    names = [name for name in GRAPH_FLAGS if getattr(flags, name) != parser.get_default(name)]
    return [f"--{name.replace('_', '-')}" for name in names]


def _copy_shipped_model(model: Path, path: Path) -> None:
    """Copy a shipped model, so that results are written next to the copy and not into the package."""
    if not path.exists():
        with atomic_write(path) as temp_path:
            shutil.copyfile(model, temp_path)
    elif file_sha256(path) != file_sha256(model):
        raise UsageError(f"{path}: not the shipped model of this name. Rename the file, or pass it as {path}.")


def _check_source(source: Path, has_weights: bool, flags: argparse.Namespace) -> None:
    """Check that the file type supports the conversions."""
    is_reduced = flags.precision != "fp32"
    if source.suffix not in (".pt", ".onnx", ".engine"):
        raise UsageError(f"{source}: expected best.pt of a training run, or an .onnx or .engine file of hkd-export.")
    if source.suffix == ".engine" and (not flags.serving or is_reduced or flags.openvino):
        raise UsageError(
            f"{source}: an .engine file supports --serving only. Pass the .onnx file for other conversions."
        )
    is_external = not has_weights and is_external_model(source)
    if is_external and is_reduced and (flags.verify or flags.openvino or flags.serving):
        raise UsageError(
            f"{source}: not written by hkd-export: --verify, --openvino and --serving are not available with "
            "--precision. Omit them."
        )
    if (
        not has_weights
        and source.suffix == ".onnx"
        and not (is_reduced or flags.trt or flags.openvino or flags.serving)
    ):
        raise UsageError(f"{source}: no conversion selected. Set --precision, --trt, --openvino, --serving or --imgsz.")


def _check_unused_flags(source: Path, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Raise UsageError for a flag that has no effect."""
    for has_effect, names, requirement in (
        (source.suffix != ".engine", GRAPH_FLAGS, f"requires weights, got {source}"),
        (flags.precision != "fp32", precision.FLAGS, "requires --precision"),
        (flags.trt, tensorrt.FLAGS, "requires --trt"),
        (bool(flags.serving), serving.SERVING_FLAGS, "requires --serving"),
    ):
        for name in () if has_effect else names:
            if getattr(flags, name) != parser.get_default(name):
                raise UsageError(f"--{name.replace('_', '-')}: {requirement}. Omit the flag.")


def _check_combinations(flags: argparse.Namespace) -> None:
    if flags.verify_images is not None:
        check_range("--verify-images", flags.verify_images, 1)
    for name in ("raw", "no_preprocess"):
        conversion = "--precision" if flags.precision != "fp32" else "--openvino" if flags.openvino else ""
        if getattr(flags, name) and conversion:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag}: not available with {conversion}, which needs the default inputs and outputs. Omit one."
            )
    if flags.trt and flags.serving:
        raise UsageError(
            "--serving: not available with --trt. Build the engine, then run hkd-export MODEL.engine --serving FORMAT."
        )
    if flags.trt:
        tensorrt.make_build_options(flags)


def _check_output(source: Path, output: Path | None, has_weights: bool, flags: argparse.Namespace) -> None:
    onnx_output, engine_output, folder_output = _split_output_by_suffix(output)
    if onnx_output and not has_weights and flags.precision == "fp32":
        raise UsageError(
            f"--output {output}: an .onnx file from {source} requires --precision or --imgsz. Set one of them."
        )
    if engine_output and (not flags.trt or flags.dry_run):
        raise UsageError(
            f"--output {output}: an .engine file requires --trt without --dry-run. Omit --output, or set these flags."
        )
    if folder_output and not flags.openvino:
        raise UsageError(
            f"--output {output}: expected a name ending in .onnx, or in .engine with --trt. "
            "A directory requires --openvino."
        )


def _split_output_by_suffix(output: Path | None) -> tuple[Path | None, Path | None, Path | None]:
    """Return `output` as (ONNX file, engine, OpenVINO directory) according to its suffix; the others are None."""
    match output.suffix if output else None:
        case None:
            return None, None, None
        case ".onnx":
            return output, None, None
        case ".engine":
            return None, output, None
        case _:
            return None, None, output


def _export_weights(
    weights: Path, output: Path | None, flags: argparse.Namespace, graph_flags: Sequence[str]
) -> tuple[Path, Verification | None]:
    """Write the ONNX file; return its path and the verification for further files."""
    try:
        from hkd_deploy.export.exporter import (  # noqa: PLC0415 - torch is only needed for weights
            export_and_verify,
            export_onnx,
            load_exported_weights,
            make_torch_reference,
        )
        from hkd_det.models.checkpoint import load_detector_checkpoint  # noqa: PLC0415 - as above
        from hkd_det.models.yolox_weights import is_yolox_file  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{weights}: the export requires {error.name}. Run pip install 'hkd-det[train]', or export the "
            "weights on the training machine and pass the .onnx file."
        ) from None
    is_exported = weights.suffix == ".onnx"
    if is_exported and not is_yolox_file(weights):
        raise UsageError(
            f"{graph_flags[0]}: requires weights (.pt) or an .onnx file of a YOLOX model in FP32, got {weights}. "
            "Omit the flag."
        )
    checkpoint = load_exported_weights(weights) if is_exported else load_detector_checkpoint(weights)
    trained_hw = checkpoint.config.get("imgsz_hw")
    export_options = make_export_options(flags, (trained_hw[0], trained_hw[1]) if trained_hw else None)
    size_suffix = f"-{format_imgsz(export_options.imgsz_hw)}" if is_exported else ""
    path = output or weights.with_name(f"{weights.stem}{size_suffix}.onnx")
    if is_exported and path.resolve() == weights.resolve():
        raise UsageError(f"--output {path}: is the file of the weights. Choose another name.")
    verification = None
    if flags.verify is False:
        export_onnx(checkpoint, path, export_options)
        note = "; not compared with torch (--no-verify)"
    else:
        data = flags.data or str(checkpoint.config.get("data", ""))
        if not data:
            raise UsageError(f"{weights}: the checkpoint does not name its dataset. Set --data, or --no-verify.")
        reference = make_torch_reference(checkpoint, str(weights), export_options)
        verification = build_verification(reference, data, flags)
        export_and_verify(checkpoint, path, export_options, verification)
        note = ""
    size_mib = path.stat().st_size / 2**20
    print(f"{path}: {checkpoint.model}, {format_imgsz(export_options.imgsz_hw)}, {size_mib:.1f} MiB{note}")
    return path, verification


def make_export_options(flags: argparse.Namespace, trained_hw: tuple[int, int] | None) -> ExportOptions:
    """Return the options that the flags of `add_arguments` set.

    Args:
        flags: Parsed command line.
        trained_hw: (height, width) of the training input in pixels, the default of `--imgsz`. None if the checkpoint
            does not contain it.

    Raises:
        UsageError: If flags exclude each other, have an invalid value, or --imgsz is required.
    """
    imgsz_hw = parse_imgsz(flags.imgsz) if flags.imgsz else trained_hw
    if imgsz_hw is None:
        raise UsageError("--imgsz: required, because the checkpoint does not contain an input size. Set WIDTHxHEIGHT.")
    if "batch" in flags.dynamic and flags.batch is not None:
        raise UsageError(f"--batch {flags.batch}: not available with --dynamic batch. Omit one.")
    if flags.max_imgsz and not flags.letterbox:
        raise UsageError(f"--max-imgsz {flags.max_imgsz}: requires --letterbox. Set --imgsz for the network input.")
    return ExportOptions(
        imgsz_hw,
        None if "batch" in flags.dynamic else 1 if flags.batch is None else flags.batch,
        "size" in flags.dynamic,
        _parse_max_imgsz(flags.max_imgsz or DEFAULT_MAX_IMGSZ) if flags.letterbox else None,
        not flags.no_preprocess,
        flags.raw,
    )


def _parse_dynamic(text: str) -> tuple[str, ...]:
    axes = tuple(text.split(","))
    if not set(axes) <= set(DYNAMIC_CHOICES):
        raise UsageError(f"--dynamic {text}: expected batch, size or batch,size. Place the model before this flag.")
    return axes


def _parse_max_imgsz(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and int(side) > 0 for side in (width, height)):
        raise UsageError(f"--max-imgsz {text}: expected WIDTHxHEIGHT in pixels. Example: {DEFAULT_MAX_IMGSZ}.")
    return int(height), int(width)


def _verify_reduced_model(onnx_path: Path, precision_name: str, verification: Verification) -> None:
    """Compare a file of --precision on every installed runtime."""
    if precision_name == "bf16":
        verification.skip(ExportedModel(onnx_path, "onnxruntime", is_exact=False), precision.BF16_SKIP_REASON)
        return
    for backend in list_onnx_backends("cpu"):
        verification.add(ExportedModel(onnx_path, backend, is_exact=False))


def _verify_engine(
    onnx_path: Path, engine_path: Path | None, verification: Verification, flags: argparse.Namespace
) -> None:
    # Not exact: since Ampere, TensorRT multiplies FP32 values in TF32, which has 10 mantissa bits.
    if engine_path:
        device = tensorrt.get_build_device(flags)
        verification.add(ExportedModel(engine_path, "tensorrt", is_exact=False, device=device))
    else:
        model = ExportedModel(onnx_path.with_suffix(".engine"), "tensorrt", is_exact=False)
        verification.skip(model, "--dry-run writes no engine")


def _write_openvino(onnx_path: Path, output: Path | None, verification: Verification | None) -> None:
    is_exact = read_onnx_file(onnx_path).precision == "fp32"

    def check(folder: Path, temp_dir: Path) -> None:
        if verification:
            verification.add(ExportedModel(folder, "openvino", is_exact), temp_dir)

    export_openvino(onnx_path, output, check)
