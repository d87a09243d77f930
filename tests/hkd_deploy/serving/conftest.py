"""Fixtures of the tests of inference servers.

`triton_proto`: the protobuf definition of config.pbtxt from NVIDIA's tritonclient wheel, downloaded on first use.
`float_onnx`: writes the tiny detector with the interface of `--no-preprocess`.
`engine`: writes an engine with its JSON file.
"""

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hkd_deploy.model_metadata import PREPROCESS, PREPROCESS_FLOAT01, TensorInfo
from hkd_deploy.trt.engine_info import EngineInfo, Profile, write_engine
from hkd_det.files import bytes_sha256

TRITON_CLIENT = "tritonclient==2.73.0"
PROTO = "tritonclient/grpc/model_config_pb2.py"


@pytest.fixture(scope="session")
def triton_proto(pytestconfig: pytest.Config) -> ModuleType:
    """The generated module `model_config_pb2`. Its package is not installed because it requires an older protobuf."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("tritonclient")
    module_file = folder / PROTO
    if not module_file.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, TRITON_CLIENT], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(PROTO, folder)
        wheel.unlink()
    spec = importlib.util.spec_from_file_location("model_config_pb2", module_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def float_onnx(tiny_onnx: Callable[..., Path]) -> Callable[..., Path]:
    """Function that writes the tiny detector for float32 (B, 3, H, W), `float_onnx(batch=..., changes={...})`."""

    def write(name: str = "student.onnx", **kwargs: object) -> Path:
        height, width = 96, 160
        path = tiny_onnx(name, imgsz_hw=(height, width), **kwargs)
        model = onnx.load(path)
        images = model.graph.input[0]
        batch = images.type.tensor_type.shape.dim[0]
        dim = batch.dim_value or batch.dim_param
        images.CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, [dim, 3, height, width]))
        first = model.graph.node[0]
        assert first.op_type == "Cast" and list(first.output) == ["float"]
        model.graph.node.remove(first)
        model.graph.initializer.append(numpy_helper.from_array(np.array(255, np.float32), "full"))
        model.graph.node.insert(0, helper.make_node("Mul", ["nhwc", "full"], ["float"]))
        model.graph.node.insert(0, helper.make_node("Transpose", ["images"], ["nhwc"], perm=[0, 2, 3, 1]))
        entries = {prop.key: prop.value for prop in model.metadata_props}
        entries["hkd.preprocess"] = json.dumps(PREPROCESS_FLOAT01)
        helper.set_model_props(model, entries | kwargs.get("changes", {}))  # type: ignore[operator]
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def engine(tmp_path: Path, model_metadata: Callable[..., dict[str, str]]) -> Callable[..., Path]:
    """Function that writes an engine (arbitrary bytes, because a CPU cannot open one) and its JSON file."""

    def write(count: bool = True, free: bool = True, preprocess: dict[str, object] = PREPROCESS) -> Path:
        path = tmp_path / "student.engine"
        batch, plan = (None if free else 1), b"a plan"
        nhwc = preprocess["layout"] == "NHWC"
        dims = (96, 160, 3) if nhwc else (3, 96, 160)
        images = TensorInfo("images", "uint8" if nhwc else "float32", (batch, *dims))
        outputs = [TensorInfo("boxes", "float32", (batch, 2, 4)), TensorInfo("scores", "float32", (batch, 2))]
        engine_info = EngineInfo(
            format=1,
            tensorrt="10.3.0",
            gpu="Orin",
            sm="8.7",
            platform="linux-aarch64",
            version_compatible=False,
            hardware_compatible=False,
            dla=None,
            precision_requested="fp32",
            precision_actual={"fp32": 9},
            inputs=(images,),
            outputs=(*outputs, *((TensorInfo("count", "int64", (batch,)),) if count else ())),
            profile=Profile((1, *dims), (2, *dims), (4, *dims)) if free else None,
            workspace_mib=1024,
            context_mib=1.0,
            build_s=1.0,
            date="2026-01-02T03:04:05+00:00",
            source="student.onnx",
            source_sha256="0f" * 32,
            engine_sha256=bytes_sha256(plan),
            metadata=model_metadata((96, 160), batch) | {"hkd.preprocess": json.dumps(preprocess)},
        )
        write_engine(path, plan, engine_info)
        return path

    return write
