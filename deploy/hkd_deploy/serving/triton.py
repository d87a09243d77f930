"""Triton's model repository: `student/config.pbtxt` and the model file under `student/1/`.

Field names and their meaning: model_config.proto of triton-inference-server/common, and the server's
docs/user_guide/model_configuration.md.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.serving.model_file import ModelFile, TensorSpec
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


MAX_QUEUE_DELAY_US = 2000  # a request waits for companions: far less than the time between two frames of a camera


def write_triton_repository(model: ModelFile, folder: Path, device: TritonDevice | None, max_batch: int) -> Path:
    """Write `folder`/NAME, which Triton loads by `--model-repository folder`; its path. NAME is the file's.

    device: by default the GPU for an engine, else the CPU. max_batch: pictures that Triton puts into one call,
    where the file leaves the batch free.
    Raises UsageError for an engine on the CPU, and for an .onnx file of bfloat16: Triton's ONNX Runtime can't run it.
    """
    if model.is_engine and device == "cpu":
        raise UsageError(f"{model.path}: a TensorRT engine runs on a GPU only; say --target-device gpu")
    if not model.is_engine and model.precision == "bf16":
        raise UsageError(
            f"{model.path}: Triton runs .onnx files with ONNX Runtime, which has no bfloat16 convolution; first "
            f"hkd-export {model.path} --trt, then --target triton with the .engine"
        )
    name = model.path.stem
    text = make_triton_config(model, name, device or ("gpu" if model.is_engine else "cpu"), max_batch)
    with atomic_write(folder / name / "1" / ("model.plan" if model.is_engine else "model.onnx")) as aside:
        shutil.copyfile(model.path, aside)
    write_text(folder / name / "config.pbtxt", text)
    return folder / name


def make_triton_config(model: ModelFile, name: str, device: TritonDevice, max_batch: int) -> str:
    """The text of config.pbtxt."""
    batched = model.batch is None
    blocks = [
        f"name: {json.dumps(name, ensure_ascii=False)}",  # quotes and backslashes in it escaped
        'platform: "tensorrt_plan"' if model.is_engine else 'platform: "onnxruntime_onnx"',
        f"max_batch_size: {max_batch if batched else 0}",
        *(_format_tensor_block("input", tensor, batched) for tensor in model.inputs),
        *(_format_tensor_block("output", tensor, batched) for tensor in model.outputs),
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if device == 'gpu' else 'KIND_CPU'} }} ]",
    ]
    if batched and max_batch > 1:
        sizes = ", ".join(str(size) for size in compute_preferred_batch_sizes(max_batch))
        blocks.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {sizes} ]\n"
            f"  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US}\n}}"
        )
    if model.is_engine:
        blocks.append("optimization { cuda { graphs: true } }")
    blocks.append(_format_warmup_block(model, batched))
    return "\n".join(blocks) + "\n"


def compute_preferred_batch_sizes(max_batch: int) -> list[int]:
    """2, 4, 8 ... and the largest itself: what a few cameras fill, without waiting for all of them."""
    powers = [2**power for power in range(1, max_batch.bit_length()) if 2**power < max_batch]
    return [*powers, max_batch]


def _format_tensor_block(kind: str, tensor: TensorSpec, is_batched: bool) -> str:
    lines = [f'name: "{tensor.name}"', f"data_type: {TRITON_DTYPES[tensor.dtype]}"]
    sides = tensor.shape[1:] if is_batched else tensor.shape
    if sides:
        lines.append(f"dims: {_format_dims(sides)}")
    else:  # one number a picture: Triton has no empty dims, and says to write it so
        lines += ["dims: [ 1 ]", "reshape { shape: [ ] }"]
    return f"{kind} [ {{\n" + "".join(f"  {line}\n" for line in lines) + "} ]"


def _format_warmup_block(model: ModelFile, is_batched: bool) -> str:
    """One call with a black picture before the first request: allocations and kernel choices are then done."""
    height, width = ModelMetadata.from_metadata(model.metadata, model.path).imgsz_hw
    (images,) = model.inputs
    sides = images.shape[1:] if is_batched else images.shape
    usual = iter((height, width))
    known = tuple(next(usual) if side is None else side for side in sides)
    return (
        'model_warmup [ {\n  name: "black"\n  batch_size: 1\n'
        f'  inputs {{\n    key: "{images.name}"\n'
        f"    value {{ data_type: {TRITON_DTYPES[images.dtype]} dims: {_format_dims(known)} zero_data: true }}\n  }}\n}} ]"
    )


def _format_dims(shape: tuple[int | None, ...]) -> str:
    return "[ " + ", ".join(str(-1 if side is None else side) for side in shape) + " ]"
