"""Tests of an engine build on a device with a fake TensorRT.

test_cli.py uses the real parser and builder. The steps that need a GPU are tested here: options of the builder, the
inspection of the engine, and the files. `test_fake_tensorrt_matches_the_real_one` compares the names of the fake with
the real package.
"""

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hkd_deploy.export.cli import main
from hkd_deploy.model_metadata import TensorInfo
from hkd_deploy.trt import bindings
from hkd_deploy.trt.bindings import TrtLog
from hkd_deploy.trt.builder import BuildOptions, BuildResult, build_plan
from hkd_deploy.trt.engine import EngineLayer, build_engine, check_precision
from hkd_deploy.trt.engine_info import Profile, parse_profile, read_engine_info, read_plan
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError


class FakeBase:
    """ILogger and IProgressMonitor, which are subclassed."""

    ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

    def __init__(self) -> None:
        """Take no arguments, as the real class."""


class FakeNetwork:
    """INetworkDefinition with one input and two layers."""

    num_layers = 2

    def __init__(self, flags: int, shape: tuple[int, ...]) -> None:
        self.flags, self.shape = flags, shape

    def get_input(self, index: int) -> Any:
        assert index == 0
        return SimpleNamespace(name="images", shape=self.shape)

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(type=SimpleNamespace(name=("CAST", "CONVOLUTION")[index]))


class FakeConfig:
    """IBuilderConfig that records its calls."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.pools: dict[str, int] = {}
        self.profiles: list[tuple[Any, ...]] = []
        self.cache: bytes | None = None

    def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return 0

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"another GPU" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch and cache != b"another TensorRT"

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: (self.cache or b"") + b"measured")


class FakeTensorRT:
    """The module `tensorrt` on a board with one DLA core.

    Args:
        precision: Data type of the layers that it builds, as the inspector writes it.
        shape: Input shape of the network.
        opens: Whether the runtime can open the engine.
    """

    __version__ = "10.3.0"
    ILogger = IProgressMonitor = FakeBase
    NetworkDefinitionCreationFlag: Any = SimpleNamespace(STRONGLY_TYPED=1)
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    BuilderFlag = SimpleNamespace(VERSION_COMPATIBLE="version", GPU_FALLBACK="fallback")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
    DeviceType = SimpleNamespace(DLA="dla")
    TensorIOMode = SimpleNamespace(INPUT="input")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, precision: str = "Float", shape: tuple[int, ...] = (1, 32, 64, 3), opens: bool = True) -> None:
        self.precision, self.shape, self.opens = precision, shape, opens
        self.config = FakeConfig()
        self.network: FakeNetwork | None = None
        self.plan: bytes | None = b"plan"
        self.context_shapes: list[tuple[int, ...]] = []

    def Builder(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        def create_network(flags: int) -> FakeNetwork:
            self.network = FakeNetwork(flags, self.shape)
            return self.network

        def build(network: FakeNetwork, config: Any) -> bytes | None:
            assert network is self.network and config is self.config
            config.progress_monitor.phase_start("Building engine", None, 1)
            assert config.progress_monitor.step_complete("Building engine", 0)
            config.progress_monitor.phase_finish("Building engine")
            if self.plan is None:
                logger.log("ERROR", "Error Code 1: Myelin\n(no tactics)")
            return self.plan

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=FakeProfile,
            build_serialized_network=build,
            num_DLA_cores=1,
        )

    def OnnxParser(self, network: FakeNetwork, logger: Any) -> Any:  # noqa: N802, ARG002 - TensorRT's name
        return SimpleNamespace(parse=bool, num_errors=0)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        def deserialize(plan: bytes) -> Any:
            assert plan == self.plan
            logger.log("ERROR", "wrong\ntag")
            return self._engine() if self.opens else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def _engine(self) -> Any:
        tensor = {"Name": "x", "Dimensions": [1, 2], "Format/Datatype": self.precision}
        conv = {"Name": "/Conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor]}
        inspector = SimpleNamespace(
            execution_context=None,
            get_engine_information=lambda form: (
                json.dumps({"Layers": [conv], "Bindings": ["images", "out"]}) * (form == "json")
            ),
        )
        context = SimpleNamespace(set_input_shape=lambda _, shape: self.context_shapes.append(shape))
        return SimpleNamespace(
            create_engine_inspector=lambda: inspector,
            create_execution_context=lambda: context,
            num_io_tensors=2,
            get_tensor_name=lambda index: ("images", "out")[index],
            get_tensor_dtype=lambda name: SimpleNamespace(name={"images": "UINT8", "out": "FLOAT"}[name]),
            get_tensor_shape=lambda name: self.shape if name == "images" else (1, 2),
            get_tensor_mode=lambda name: "input" if name == "images" else "output",
            device_memory_size_v2=3 * 2**19,
        )


class FakeProfile:
    """IOptimizationProfile."""

    def __init__(self) -> None:
        self.shapes: tuple[Any, ...] = ()

    def set_shape(self, *shapes: Any) -> None:
        self.shapes = shapes


class FakeCuda:
    """cuda.bindings.runtime on a machine with one Orin."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815 - CUDA's name

    def __getattr__(self, name: str) -> Any:
        results = {
            "cudaGetDeviceCount": (0, 1),
            "cudaSetDevice": (0,),
            "cudaMemGetInfo": (0, 5 * 2**30, 8 * 2**30),
            "cudaGetDeviceProperties": (0, SimpleNamespace(name=b"Orin", major=8, minor=7)),
        }
        return lambda *_: results[name]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeTensorRT], FakeTensorRT]:
    """Return a function that installs a fake TensorRT and a fake GPU."""

    def use(trt: FakeTensorRT) -> FakeTensorRT:
        modules = {"tensorrt": trt, "cuda.bindings.runtime": FakeCuda()}
        import_module = importlib.import_module
        monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or import_module(name))
        return trt

    return use


def test_build_writes_engine_and_json(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], capsys: pytest.CaptureFixture[str]
) -> None:
    trt = board(FakeTensorRT("Row major linear FP16 format"))
    path = graph(precision="fp16")
    assert main([str(path), "--trt", "--print-layers", "--workspace", "256"]) == 0
    engine = path.with_suffix(".engine")
    info = read_engine_info(engine)
    assert read_plan(engine, info) == engine.read_bytes() == b"plan"  # the plain plan, as trtexec reads it
    assert (info.tensorrt, info.gpu, info.sm) == ("10.3.0", "Orin", "8.7")
    assert (info.version_compatible, info.hardware_compatible, info.dla) == (False, False, None)
    assert (info.precision_requested, info.precision_actual) == ("fp16", {"fp16": 1})
    assert info.inputs == (TensorInfo("images", "uint8", (1, 32, 64, 3)),)
    assert [tensor.name for tensor in info.outputs] == ["out"]
    assert info.metadata == {"hkd.precision": "fp16", "imgsz": "[32, 64]"} and info.source == "small.onnx"
    assert info.source_sha256 == read_onnx_file(path).sha256 and info.profile is None and info.context_mib == 1.5
    assert info.build_memory_mib is not None and info.build_memory_mib > 20 and info.build_gpu_memory_mib == 0
    output = capsys.readouterr().out
    assert "small.engine: Orin, TensorRT 10.3.0" in output and "/Conv" in output
    assert "Compute layers: 1 fp16 (requested: fp16)" in output
    (layer,) = json.loads(engine.with_name("small.engine.layers.json").read_text())
    assert layer["precision"] == "fp16" and layer["layer_type"] == "CaskConvolution" and layer["is_compute"]
    assert trt.network is not None and trt.network.flags == 1 << 1  # strongly typed
    assert trt.config.pools == {"workspace": 256 * 2**20} and not trt.config.flags
    assert trt.config.profiling_verbosity == "detailed"  # type: ignore[attr-defined]


def test_strongly_typed_flag_may_be_absent(graph: Callable[..., Path], board: Callable[..., FakeTensorRT]) -> None:
    trt = FakeTensorRT()
    trt.NetworkDefinitionCreationFlag = SimpleNamespace()
    board(trt)
    assert main([str(graph()), "--trt"]) == 0
    assert trt.network is not None and trt.network.flags == 0


@pytest.mark.parametrize(
    ("requested", "built"), [("fp16", "Float"), ("int8", "Half"), ("fp32", "Int8"), ("bf16", "Half")]
)
def test_engine_of_another_precision_is_not_written(
    graph: Callable[..., Path],
    board: Callable[..., FakeTensorRT],
    requested: str,
    built: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    board(FakeTensorRT(built))
    path = graph(metadata_precision=requested)
    assert main([str(path), "--trt"]) == 1
    assert f"requested {requested}, but TensorRT built 1 " in capsys.readouterr().err
    assert list(path.parent.iterdir()) == [path]


def test_check_precision_allows_fp32_layers_in_fp16(graph: Callable[..., Path]) -> None:
    mixed = [
        EngineLayer(name, "correlation", precision, (1,), True) for name, precision in (("a", "fp16"), ("b", "fp32"))
    ]
    check_precision(read_onnx_file(graph(precision="fp16")), mixed)
    check_precision(read_onnx_file(graph()), [mixed[1], EngineLayer("c", "gemm", "other", (1,), True)])
    with pytest.raises(DataError, match="requested fp32, but TensorRT built 1 fp16, 1 fp32 layers"):
        check_precision(read_onnx_file(graph()), mixed)


def test_dynamic_engine_is_inspected_at_the_optimum(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT]
) -> None:
    trt = board(FakeTensorRT(shape=(-1, 32, 64, 3)))
    path = graph(batch=None)
    info, _ = build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda")
    shapes = [(batch, 32, 64, 3) for batch in (1, 4, 8)]
    assert trt.config.profiles == [("images", *shapes)] and trt.context_shapes == [shapes[1]]
    assert info.profile is not None and info.profile.max == (8, 32, 64, 3)


def build(path: Path, trt: FakeTensorRT, **options: Any) -> BuildResult:
    return build_plan(trt, read_onnx_file(path), BuildOptions(**options), TrtLog())


def test_version_compatible_sets_a_flag(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT()
    build(graph(), trt, version_compatible=True)
    assert trt.config.flags == ["version"] and not hasattr(trt.config, "hardware_compatibility_level")


def test_hardware_compatible_sets_the_level(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT()
    build(graph(), trt, hardware_compatible=True)
    assert not trt.config.flags and trt.config.hardware_compatibility_level == "ampere+"  # type: ignore[attr-defined]


def test_hardware_compatible_on_a_jetson_raises(
    graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bindings, "JETSON_RELEASE_FILE", tmp_path)
    with pytest.raises(UsageError, match="--hardware-compatible: not supported on a Jetson"):
        build(graph(), FakeTensorRT(), hardware_compatible=True)


def test_dla_is_configured_with_gpu_fallback(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT("Half")
    build(graph(precision="fp16"), trt, dla=0)
    config: Any = trt.config
    assert (config.default_device_type, config.DLA_core, config.flags) == ("dla", 0, ["fallback"])


@pytest.mark.parametrize(
    ("precision", "shape", "core", "error_class", "message"),
    [
        ("fp16", (1, 32, 64, 3), 1, UnavailableError, r"--dla 1: TensorRT 10.3.0 finds 1 DLA core\(s\)"),
        ("fp32", (1, 32, 64, 3), 0, UsageError, "--dla 0: expected an fp16 or int8 model, got fp32"),
        ("fp16", (-1, 32, 64, 3), 0, UsageError, "--dla 0: the DLA runs one shape only"),
    ],
)
def test_unsupported_dla_raises(
    graph: Callable[..., Path],
    precision: str,
    shape: tuple[int, ...],
    core: int,
    error_class: type[HkdError],
    message: str,
) -> None:
    with pytest.raises(error_class, match=message):
        build(graph(precision=precision), FakeTensorRT(shape=shape), dla=core)


def test_timing_cache_is_read_and_written(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], tmp_path: Path
) -> None:
    cache = tmp_path / "orin.cache"
    for num_builds in (1, 2):
        board(FakeTensorRT())
        assert main([str(graph()), "--trt", "--timing-cache", str(cache)]) == 0
        assert cache.read_bytes() == num_builds * b"measured"


def test_unwritable_timing_cache_keeps_the_engine(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board(FakeTensorRT())
    path, cache = graph(), tmp_path / "a file" / "orin.cache"
    cache.parent.write_text("not a directory")
    assert main([str(path), "--trt", "--timing-cache", str(cache)]) == 2
    engine = path.with_suffix(".engine")
    assert read_plan(engine, read_engine_info(engine)) == b"plan"
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-export: "))
    assert f"--timing-cache {cache}: cannot be written (" in line and f"The engine is complete: {engine}" in line


@pytest.mark.parametrize("content", [b"another GPU", b"another TensorRT"])
def test_timing_cache_of_another_machine_raises(graph: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "l4.cache"
    cache.write_bytes(content)
    with pytest.raises(UsageError, match=r"--timing-cache .*l4\.cache: not a timing cache of this GPU and TensorRT"):
        build(graph(), FakeTensorRT(), timing_cache=cache)
    assert cache.read_bytes() == content


def test_failed_build_reports_the_reason(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT()
    trt.plan = None
    with pytest.raises(DataError, match=r"cannot build it: Error Code 1: Myelin \(no tactics\)\. Use the \.onnx file"):
        build(graph(), trt)


def test_engine_that_cannot_be_opened_is_not_written(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT]
) -> None:
    board(FakeTensorRT(opens=False))
    path = graph()
    with pytest.raises(DataError, match="was built but cannot be opened: wrong tag"):
        build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda")
    assert list(path.parent.iterdir()) == [path]


def test_absent_gpu_raises(graph: Callable[..., Path], board: Callable[..., FakeTensorRT]) -> None:
    board(FakeTensorRT())
    path = graph()
    with pytest.raises(UnavailableError, match=r"--device cuda:1: this machine has 1 GPU"):
        build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda:1")


def test_builder_without_a_driver_raises(graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeTensorRT, logger: Any) -> Any:  # noqa: ARG001 - signature of the fake
        logger.log("ERROR", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(FakeTensorRT, "Builder", fail)
    with pytest.raises(
        UnavailableError, match=r"does not start: CUDA initialization failure .* requires an NVIDIA GPU"
    ):
        build(graph(), FakeTensorRT())


@pytest.mark.parametrize(
    ("version", "max_opset"), [("10.3.0", 20), ("10.12.0", 20), ("10.13.2", 24), ("11.4.0.106", 24)]
)
def test_too_new_opset_raises(graph: Callable[..., Path], version: str, max_opset: int) -> None:
    import onnx

    path, trt = graph(), FakeTensorRT()
    trt.__version__ = version  # type: ignore[misc]
    model = onnx.load(path)
    model.opset_import[0].version = max_opset
    path.write_bytes(model.SerializeToString())
    build(path, trt)
    model.opset_import[0].version = max_opset + 1
    path.write_bytes(model.SerializeToString())
    message = f"opset {max_opset + 1} is too new for TensorRT {version}, which supports opsets up to {max_opset}"
    with pytest.raises(DataError, match=message):
        build(path, trt)


def test_requested_profile_reaches_the_builder(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT(shape=(-1, 32, 64, 3))
    result = build(graph(batch=None), trt, profile=parse_profile("1,2,3"))
    assert result.profile == Profile((1, 32, 64, 3), (2, 32, 64, 3), (3, 32, 64, 3))
    assert trt.config.profiles == [("images", (1, 32, 64, 3), (2, 32, 64, 3), (3, 32, 64, 3))]
    assert result.layer_counts == {"CAST": 1, "CONVOLUTION": 1}


# Names of the real package that the fake implements, by class.
USED = {
    "Builder": ["create_network", "create_builder_config", "create_optimization_profile", "num_DLA_cores"],
    "IBuilderConfig": [
        *("set_memory_pool_limit", "set_flag", "add_optimization_profile", "progress_monitor", "profiling_verbosity"),
        *("create_timing_cache", "set_timing_cache", "get_timing_cache", "default_device_type", "DLA_core"),
        "hardware_compatibility_level",
    ],
    "INetworkDefinition": ["num_layers", "get_layer", "get_input"],
    "OnnxParser": ["parse", "num_errors", "get_error"],
    "ParserError": ["node", "node_name", "node_operator", "desc"],
    "IOptimizationProfile": ["set_shape"],
    "IProgressMonitor": ["phase_start", "step_complete", "phase_finish"],
    "ICudaEngine": ["create_engine_inspector", "create_execution_context", "device_memory_size_v2", "get_tensor_mode"],
    "EngineInspector": ["execution_context", "get_engine_information"],
    "Runtime": ["deserialize_cuda_engine", "engine_host_code_allowed"],
    "ITimingCache": ["serialize"],
    "ILogger": ["ERROR", "INTERNAL_ERROR"],
    "ProfilingVerbosity": ["DETAILED"],
    "MemoryPoolType": ["WORKSPACE"],
    "BuilderFlag": ["VERSION_COMPATIBLE", "GPU_FALLBACK"],
    "HardwareCompatibilityLevel": ["AMPERE_PLUS"],
    "DeviceType": ["DLA"],
    "TensorIOMode": ["INPUT"],
    "LayerInformationFormat": ["JSON"],
}
PRINT_MISSING = """
import json, sys
import tensorrt as trt
print(json.dumps([f"{cls}.{name}" for cls, names in json.loads(sys.argv[1]).items() for name in names
                  if not hasattr(getattr(trt, cls), name)]))
"""


@pytest.mark.slow
def test_fake_tensorrt_matches_the_real_one(tensorrt_python: Path) -> None:
    command = [str(tensorrt_python), "-c", PRINT_MISSING, json.dumps(USED)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == []
