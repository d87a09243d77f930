"""Model repository for Triton Inference Server: `NAME/config.pbtxt` and the model file in `NAME/1/`.

Field names follow model_config.proto of triton-inference-server/common and docs/user_guide/model_configuration.md of
the server.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

from hkd_deploy.model_metadata import ModelMetadata, TensorInfo
from hkd_deploy.serving.model_file import ModelFile
from hkd_det.errors import UsageError
from hkd_det.files import atomic_write, write_text

TritonDevice = Literal["cpu", "gpu"]

TRITON_DTYPES = {
    "uint8": "TYPE_UINT8",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}

MAX_QUEUE_DELAY_US = 2000  # a request waits for others to form a batch: much less than a frame interval of a camera


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
