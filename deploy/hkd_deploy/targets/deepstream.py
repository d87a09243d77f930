"""DeepStream: a folder with nvinfer's configuration, the labels, the model and the source of its output parser.

nvinfer prepares pictures itself: scaled with the aspect ratio kept, top left, float32 (B, 3, H, W) RGB times
net-scale-factor. That is the graph of `hkd-export --no-preprocess`. (It pads with black, not with our grey.)
Keys: the page "Gst-nvinfer" of the DeepStream developer guide.
"""

import ast
import shutil
from importlib.resources import files
from pathlib import Path

from hkd_deploy.artifact import Manifest
from hkd_deploy.targets.model_file import ModelFile
from hkd_deploy.targets.onnx_outputs import without_output
from hkd_det.errors import DataError, UsageError
from hkd_det.files import replacing, write_text

PARSER_FILES = ("nvdsinfer_hkd.cpp", "Makefile")
THRESHOLD = 0.3  # the least score that becomes an object, as hkd-demo's --conf
COUNT = "count"


def write_deepstream(model: ModelFile, folder: Path, max_batch: int) -> Path:
    """Write `folder`/NAME; its path. In it: `make`, then give config_infer_primary.txt to nvinfer.

    max_batch: pictures in one call, where the file leaves the batch free.
    Raises UsageError, naming the flag to export with, for a graph that nvinfer cannot feed.
    """
    manifest = Manifest.from_metadata(model.metadata, model.path)
    _check(model, manifest)
    labels, settings = _labels(model), config(model, manifest, max_batch)
    target = folder / model.path.stem
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / model.path.name) as aside:
        if model.is_engine:
            shutil.copyfile(model.path, aside)
        else:
            without_output(model.path, COUNT, aside)
    for name in PARSER_FILES:
        write_text(target / name, (files("hkd_deploy.targets") / "nvdsinfer_hkd" / name).read_text(encoding="utf-8"))
    write_text(target / "labels.txt", "\n".join(labels) + "\n")
    write_text(target / "config_infer_primary.txt", settings)
    return target


def config(model: ModelFile, manifest: Manifest, max_batch: int) -> str:
    """The text of config_infer_primary.txt; its paths are relative to itself."""
    batch = manifest.batch or max_batch
    height, width = manifest.imgsz_hw
    lines = [
        "[property]",
        "gpu-id=0",
        "gie-unique-id=1",
        *_sources(model, batch),
        "network-mode=0",
        "network-type=0",
        f"batch-size={batch}",
        f"infer-dims=3;{height};{width}",
        "interval=0",
        "process-mode=1",
        "# the picture as the network was trained on it: RGB / 255, aspect ratio kept, top left",
        "net-scale-factor=0.00392156862745098",
        "model-color-format=0",
        "maintain-aspect-ratio=1",
        "symmetric-padding=0",
        "# a box is found once: no clustering, no NMS",
        "cluster-mode=4",
        f"num-detected-classes={len(_labels(model))}",
        "labelfile-path=labels.txt",
        "parse-bbox-func-name=NvDsInferParseCustomHkd",
        "custom-lib-path=libnvdsinfer_hkd.so",
        "",
        "[class-attrs-all]",
        f"pre-cluster-threshold={THRESHOLD}",
    ]
    return "\n".join(lines) + "\n"


def _sources(model: ModelFile, batch: int) -> list[str]:
    name = model.path.name
    if model.is_engine:
        return [f"model-engine-file={name}"]
    if model.metadata.get("hkd.precision", "fp32") != "fp32":
        engine = model.path.with_suffix(".engine").name
        build = (
            f"# made on the device, in this folder: hkd-export {name} --trt (nvinfer's builder does not type strongly)"
        )
        return [build, f"model-engine-file={engine}"]
    # nvinfer builds the engine on first start and saves it under exactly this name
    return [f"onnx-file={name}", f"model-engine-file={name}_b{batch}_gpu0_fp32.engine"]


def _check(model: ModelFile, manifest: Manifest) -> None:
    (images,) = model.inputs
    if manifest.preprocess != "float01":
        raise UsageError(
            f"{model.path}: takes {images}, nvinfer gives float32 (B, 3, H, W); "
            "export the weights for it: hkd-export best.pt --no-preprocess --target deepstream"
        )
    if manifest.raw:
        raise UsageError(f"{model.path}: gives raw candidates (--raw), nvinfer's parser wants boxes; export without it")
    if manifest.dynamic_size:
        raise UsageError(f"{model.path}: its size is free, nvinfer's is fixed; export with --dynamic batch, or none")
    if model.is_engine and COUNT in {output.name for output in model.outputs}:
        raise UsageError(
            f"{model.path}: its output count has no side behind the batch, and nvinfer gives it no memory; "
            "first hkd-export MODEL.onnx --target deepstream, then build the engine from the .onnx written there"
        )


def _labels(model: ModelFile) -> list[str]:
    try:
        names = ast.literal_eval(model.metadata["names"])
        return [str(names[index]) for index in range(len(names))]
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{model.path}: metadata names cannot be read ({error}); export it again") from None
