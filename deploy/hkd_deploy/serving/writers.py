"""Directories for inference servers.

Triton: a model repository with `NAME/config.pbtxt` and the model file in `NAME/1/`. Field names follow
model_config.proto of triton-inference-server/common and docs/user_guide/model_configuration.md of the server.

DeepStream: nvinfer configuration, labels, model and the source of the output parser. nvinfer prepares images itself: it
scales with a fixed aspect ratio, places the image top left and passes float32 [B, 3, H, W] RGB times net-scale-factor.
It pads with black instead of gray 114. Keys: chapter "Gst-nvinfer" of the DeepStream developer guide.
"""

import argparse
import ast
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Literal

from hkd_deploy.model_metadata import ModelMetadata, TensorInfo
from hkd_deploy.serving.model_file import COUNT_OUTPUT, ModelFile, read_model_file, write_nvinfer_graph
from hkd_det.config import check_range
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, write_text

TritonDevice = Literal["cpu", "gpu"]
SERVING_FORMATS = ("triton", "deepstream")
SERVING_FLAGS = ("serving_dir", "serving_device", "max_batch")  # argparse names; each requires --serving
DEFAULT_MAX_BATCH = 8

TRITON_DTYPES = {
    "uint8": "TYPE_UINT8",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}

MAX_QUEUE_DELAY_US = 2000  # a request waits for others to form a batch: much less than a frame interval of a camera
PARSER_FILES = ("nvdsinfer_hkd.cpp", "Makefile")
MIN_OBJECT_SCORE = 0.3  # as the default of hkd-demo --conf

# network-mode of nvinfer. It has no value for bfloat16, and ignores the value for a finished engine.
NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}

BUILD_ENGINE_HINT = (
    "Run hkd-export MODEL.onnx --serving deepstream, then build the engine from the .onnx file written there."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of inference servers to `parser`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("inference servers")
    group.add_argument(
        "--serving",
        action="extend",
        type=_parse_serving_formats,
        default=[],
        metavar="triton,deepstream",
        help="also write the files that Triton or DeepStream loads",
    )
    group.add_argument(
        "--serving-dir",
        type=Path,
        metavar="DIR",
        help="output directory; requires --serving (default: triton/ and deepstream/ next to the model)",
    )
    group.add_argument(
        "--serving-device",
        choices=("cpu", "gpu"),
        help="device of the Triton model instance; requires --serving (default: gpu for an engine, else cpu)",
    )
    group.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help=f"largest batch if the batch of the model is free; requires --serving (default: {DEFAULT_MAX_BATCH}, "
        "or the limit of an engine)",
    )


def write_serving_folders(path: Path, flags: argparse.Namespace) -> None:
    """Write the files that `--serving` requests and print their location.

    Args:
        path: The .onnx or .engine file.
        flags: Parsed flags of `add_arguments`.

    Raises:
        UsageError: A flag is invalid, or the server cannot run the model.
        DataError: The model file is damaged.
    """
    if not flags.serving:
        return
    model = read_model_file(path)
    max_batch = _resolve_max_batch(model, flags.max_batch)
    for server in dict.fromkeys(flags.serving):
        folder = (flags.serving_dir or path.parent) / server
        match server:
            case "triton":
                written = write_triton_repository(model, folder, flags.serving_device, max_batch)
                print(f"{written}: run tritonserver --model-repository {folder}")
            case "deepstream":
                written = write_deepstream(model, folder, max_batch)
                print(f"{written}: run make there on the device, then pass config_infer_primary.txt to nvinfer")


def write_triton_repository(model: ModelFile, folder: Path, device: TritonDevice | None, max_batch: int) -> Path:
    """Write a model repository, which `tritonserver --model-repository FOLDER` loads.

    Args:
        model: The model file. Its name without suffix becomes the model name in Triton.
        folder: The repository.
        device: Device of the model instance. None for the GPU if the model is an engine, else for the CPU.
        max_batch: Largest batch that Triton forms if the batch dimension of the model is free.

    Returns:
        The directory of the model in the repository.

    Raises:
        UsageError: Triton cannot run the model: an engine on the CPU, or a bfloat16 ONNX file.
    """
    if model.is_engine and device == "cpu":
        raise UsageError(f"{model.path}: a TensorRT engine runs on a GPU only. Set --serving-device gpu.")
    if not model.is_engine and model.precision == "bf16":
        raise UsageError(
            f"{model.path}: Triton runs .onnx files with ONNX Runtime, which has no bfloat16 convolution. "
            f"Run hkd-export {model.path} --trt, then --serving triton with the .engine file."
        )
    name = model.path.stem
    text = make_triton_config(model, name, device or ("gpu" if model.is_engine else "cpu"), max_batch)
    with atomic_write(folder / name / "1" / ("model.plan" if model.is_engine else "model.onnx")) as temp_path:
        shutil.copyfile(model.path, temp_path)
    write_text(folder / name / "config.pbtxt", text)
    return folder / name


def make_triton_config(model: ModelFile, name: str, device: TritonDevice, max_batch: int) -> str:
    """Create the content of config.pbtxt.

    Args:
        model: The model file.
        name: Name of the model in Triton.
        device: Device of the model instance.
        max_batch: Largest batch if the batch dimension of the model is free.

    Returns:
        The text, in protobuf text format.
    """
    is_batched = model.batch is None
    blocks = [
        f"name: {json.dumps(name, ensure_ascii=False)}",  # escapes quotes and backslashes
        'platform: "tensorrt_plan"' if model.is_engine else 'platform: "onnxruntime_onnx"',
        f"max_batch_size: {max_batch if is_batched else 0}",
        *(_format_tensor_block("input", tensor, is_batched) for tensor in model.inputs),
        *(_format_tensor_block("output", tensor, is_batched) for tensor in model.outputs),
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if device == 'gpu' else 'KIND_CPU'} }} ]",
    ]
    if is_batched and max_batch > 1:
        sizes = ", ".join(str(size) for size in compute_preferred_batch_sizes(max_batch))
        blocks.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {sizes} ]\n"
            f"  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US}\n}}"
        )
    if model.is_engine:
        blocks.append("optimization { cuda { graphs: true } }")
    blocks.append(_format_warmup_block(model, is_batched))
    return "\n".join(blocks) + "\n"


def compute_preferred_batch_sizes(max_batch: int) -> list[int]:
    """Compute the batch sizes that Triton forms without waiting for `max_batch` requests.

    Args:
        max_batch: Largest batch.

    Returns:
        The powers of two from 2 below `max_batch`, followed by `max_batch`.
    """
    powers = [2**power for power in range(1, max_batch.bit_length()) if 2**power < max_batch]
    return [*powers, max_batch]


def _format_tensor_block(field: str, tensor: TensorInfo, is_batched: bool) -> str:
    lines = [f'name: "{tensor.name}"', f"data_type: {TRITON_DTYPES[tensor.dtype]}"]
    dims = tensor.shape[1:] if is_batched else tensor.shape
    if dims:
        lines.append(f"dims: {_format_dims(dims)}")
    else:  # Triton does not accept empty dims; its documentation requires this reshape for one value per image
        lines += ["dims: [ 1 ]", "reshape { shape: [ ] }"]
    return f"{field} [ {{\n" + "".join(f"  {line}\n" for line in lines) + "} ]"


def _format_warmup_block(model: ModelFile, is_batched: bool) -> str:
    """Format a request with a black image. Triton runs it at startup, before the first client request."""
    imgsz_hw = iter(ModelMetadata.from_metadata(model.metadata, model.path).imgsz_hw)
    (images,) = model.inputs
    dims = images.shape[1:] if is_batched else images.shape
    fixed_dims = tuple(next(imgsz_hw) if dim is None else dim for dim in dims)
    return (
        'model_warmup [ {\n  name: "black"\n  batch_size: 1\n'
        f'  inputs {{\n    key: "{images.name}"\n'
        f"    value {{ data_type: {TRITON_DTYPES[images.dtype]} dims: {_format_dims(fixed_dims)} zero_data: true }}\n"
        "  }\n} ]"
    )


def _format_dims(shape: tuple[int | None, ...]) -> str:
    return "[ " + ", ".join(str(-1 if dim is None else dim) for dim in shape) + " ]"


def write_deepstream(model: ModelFile, folder: Path, max_batch: int) -> Path:
    """Write the files for one model. On the device, run `make` there and pass config_infer_primary.txt to nvinfer.

    Args:
        model: The model file.
        folder: Parent directory. The model name becomes the directory name.
        max_batch: Batch size if the batch dimension of the model is free.

    Returns:
        The directory of the model.

    Raises:
        UsageError: nvinfer cannot feed the graph. The message names the flag to export with.
        DataError: The graph or its metadata is damaged.
        UnavailableError: The onnx package is missing.
    """
    metadata = ModelMetadata.from_metadata(model.metadata, model.path)
    _check_deepstream_input(model, metadata)
    labels, config = _read_labels(model), make_deepstream_config(model, metadata, max_batch)
    model_dir = folder / model.path.stem
    model_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(model_dir / model.path.name) as temp_path:
        if model.is_engine:
            shutil.copyfile(model.path, temp_path)
        else:
            write_nvinfer_graph(model.path, metadata, temp_path)
    parser_dir = files("hkd_deploy.serving") / "nvdsinfer_hkd"
    for name in PARSER_FILES:
        write_text(model_dir / name, (parser_dir / name).read_text(encoding="utf-8"))
    write_text(model_dir / "labels.txt", "\n".join(labels) + "\n")
    write_text(model_dir / "config_infer_primary.txt", config)
    return model_dir


def make_deepstream_config(model: ModelFile, metadata: ModelMetadata, max_batch: int) -> str:
    """Create the content of config_infer_primary.txt. Its paths are relative to the file.

    Args:
        model: The model file.
        metadata: Metadata of the model.
        max_batch: Batch size if the batch dimension of the model is free.

    Returns:
        The text, in the key file format of GLib.
    """
    batch = metadata.batch or max_batch
    height, width = metadata.imgsz_hw
    lines = [
        "[property]",
        "gpu-id=0",
        "gie-unique-id=1",
        *_format_model_lines(model, metadata, batch),
        f"network-mode={NETWORK_MODES.get(model.precision, 0)}",
        "network-type=0",
        f"batch-size={batch}",
        f"infer-dims=3;{height};{width}",
        "interval=0",
        "process-mode=1",
        "# preprocessing as in training: RGB / 255, fixed aspect ratio, top left",
        "net-scale-factor=0.00392156862745098",
        "model-color-format=0",
        "maintain-aspect-ratio=1",
        "symmetric-padding=0",
        "# the graph suppresses duplicates: no clustering, no NMS",
        "cluster-mode=4",
        f"num-detected-classes={len(_read_labels(model))}",
        "labelfile-path=labels.txt",
        "parse-bbox-func-name=NvDsInferParseCustomHkd",
        "custom-lib-path=libnvdsinfer_hkd.so",
        "",
        "[class-attrs-all]",
        f"pre-cluster-threshold={MIN_OBJECT_SCORE}",
    ]
    return "\n".join(lines) + "\n"


def _format_model_lines(model: ModelFile, metadata: ModelMetadata, batch: int) -> list[str]:
    name = model.path.name
    if model.is_engine:
        return [f"model-engine-file={name}"]
    if model.precision != "fp32":
        # nvinfer rejects an engine whose largest batch is below batch-size
        profile = f" --trt-profile 1,{batch},{batch}" if metadata.batch is None else ""
        return [
            "# build on the device, in this directory (the builder of nvinfer is not strongly typed):",
            f"#   hkd-export {name} --trt{profile}",
            f"model-engine-file={model.path.with_suffix('.engine').name}",
        ]
    # nvinfer builds the engine at the first start and saves it under exactly this name
    return [f"onnx-file={name}", f"model-engine-file={name}_b{batch}_gpu0_fp32.engine"]


def _check_deepstream_input(model: ModelFile, metadata: ModelMetadata) -> None:
    (images,) = model.inputs
    path = model.path
    if model.is_engine and metadata.preprocess != "float01":
        raise UsageError(f"{path}: input {images}: nvinfer passes float32 (B, 3, H, W). {BUILD_ENGINE_HINT}")
    if metadata.letterbox:
        raise UsageError(f"{path}: exported with --letterbox, which nvinfer does itself. Export without it.")
    if metadata.raw:
        raise UsageError(f"{path}: exported with --raw, but the output parser expects boxes. Export without it.")
    if metadata.dynamic:
        raise UsageError(
            f"{path}: the input size is free, but nvinfer needs a fixed size. Export without --dynamic size."
        )
    if model.is_engine and COUNT_OUTPUT in {output.name for output in model.outputs}:
        raise UsageError(
            f"{path}: output {COUNT_OUTPUT} has no dimension after the batch; nvinfer allocates no memory for it. "
            f"{BUILD_ENGINE_HINT}"
        )


def _read_labels(model: ModelFile) -> list[str]:
    try:
        names = ast.literal_eval(model.metadata["names"])
        return [str(names[index]) for index in range(len(names))]
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{model.path}: metadata names: cannot be read ({error}). Export the model again.") from None


def _resolve_max_batch(model: ModelFile, requested: int | None) -> int:
    if requested is not None:
        check_range("--max-batch", requested, 1)
    if requested is not None and model.max_batch is not None and requested > model.max_batch:
        raise UsageError(
            f"--max-batch {requested}: {model.path} supports at most {model.max_batch}. "
            "Build an engine with a larger --trt-profile."
        )
    return requested or model.max_batch or DEFAULT_MAX_BATCH


def _parse_serving_formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SERVING_FORMATS:
            raise UsageError(
                f"--serving {text}: expected {' or '.join(SERVING_FORMATS)}, or both separated by a comma."
            )
    return names
