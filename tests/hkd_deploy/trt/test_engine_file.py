"""Building on a device: what is asked of TensorRT, what is read back, and what is written. TensorRT is make-believe.

The real parser and builder are asked in test_checking.py; what only a GPU can do is here.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hkd_deploy.export.cli import main
from hkd_deploy.trt import builder
from hkd_deploy.trt import cuda as bindings
from hkd_deploy.trt import engine as engine_file
from hkd_deploy.trt.builder import BuildOptions, BuildResult, TrtLog
from hkd_deploy.trt.engine import EngineLayer, build_engine, check_precision
from hkd_deploy.trt.engine_info import read_engine_info, read_plan
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_deploy.trt.profile import Profile, parse_profile
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError


class Monitored:
    """A base class of TensorRT's, to inherit from."""

    ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

    def __init__(self) -> None:
        """As the real one must be called."""


class FakeNetwork:
    """INetworkDefinition of one input and two layers."""

    num_layers = 2

    def __init__(self, flags: int, shape: tuple[int, ...]) -> None:
        self.flags, self.shape = flags, shape

    def get_input(self, index: int) -> Any:
        assert index == 0
        return SimpleNamespace(name="images", shape=self.shape)

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(type=SimpleNamespace(name=("CAST", "CONVOLUTION")[index]))


class FakeConfig:
    """IBuilderConfig; remembers what it was told."""

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
        return None if content == b"of another GPU" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch and cache != b"of another TensorRT"

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: (self.cache or b"") + b"measured")


class FakeTensorRT:
    """The module `tensorrt` on a board with one DLA; what it builds has `precision`."""

    __version__ = "10.3.0"
    ILogger = IProgressMonitor = Monitored
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
    """cuda.bindings.runtime of one Orin."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815 - CUDA's name

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cudaGetDeviceCount": (0, 1),
            "cudaSetDevice": (0,),
            "cudaGetDeviceProperties": (0, SimpleNamespace(name=b"Orin", major=8, minor=7)),
        }
        return lambda *_: answers[name]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeTensorRT], FakeTensorRT]:
    """`board(trt)` makes this machine one with a GPU and that TensorRT."""

    def use(trt: FakeTensorRT) -> FakeTensorRT:
        modules = {"tensorrt": trt, "cuda.bindings.runtime": FakeCuda()}
        monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])
        return trt

    return use


def test_an_engine_and_its_sidecar(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], capsys: pytest.CaptureFixture[str]
) -> None:
    trt = board(FakeTensorRT("Row major linear FP16 format"))
    path = graph(precision="fp16")
    assert main([str(path), "--trt", "--layers", "--workspace", "256"]) == 0
    engine = path.with_suffix(".engine")
    sidecar = read_engine_info(engine)
    assert read_plan(engine, sidecar) == engine.read_bytes() == b"plan"  # nothing before it: trtexec must load it
    assert (sidecar.tensorrt, sidecar.gpu, sidecar.sm) == ("10.3.0", "Orin", "8.7")
    assert (sidecar.precision_requested, sidecar.precision_actual) == ("fp16", {"fp16": 1})
    assert [(facts.name, facts.dtype, facts.shape) for facts in sidecar.inputs] == [("images", "UINT8", [1, 32, 64, 3])]
    assert [facts.name for facts in sidecar.outputs] == ["out"]
    assert sidecar.metadata == {"hkd.precision": "fp16", "imgsz": "[32, 64]"} and sidecar.source == "small.onnx"
    assert (
        sidecar.source_sha256 == read_onnx_file(path).sha256 and sidecar.profile is None and sidecar.context_mib == 1.5
    )
    said = capsys.readouterr().out
    assert (
        "small.engine: Orin, TensorRT 10.3.0" in said
        and "layers that multiply: 1 fp16 (asked: fp16)" in said
        and "/Conv" in said
    )
    assert json.loads(engine.with_name("small.engine.layers.json").read_text())[0]["precision"] == "fp16"
    assert trt.network is not None and trt.network.flags == 1 << 1  # strongly typed
    assert trt.config.pools == {"workspace": 256 * 2**20} and not trt.config.flags
    assert trt.config.profiling_verbosity == "detailed"  # type: ignore[attr-defined]


def test_where_the_flag_of_strong_typing_is_gone(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT]
) -> None:
    trt = FakeTensorRT()
    trt.NetworkDefinitionCreationFlag = SimpleNamespace()
    board(trt)
    assert main([str(graph()), "--trt"]) == 0
    assert trt.network is not None and trt.network.flags == 0


@pytest.mark.parametrize(("asked", "built"), [("fp16", "Float"), ("int8", "Half"), ("fp32", "Int8"), ("bf16", "Half")])
def test_another_precision_than_asked_is_not_written(
    graph: Callable[..., Path],
    board: Callable[..., FakeTensorRT],
    asked: str,
    built: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    board(FakeTensorRT(built))
    path = graph(said=asked)
    assert main([str(path), "--trt"]) == 1
    assert f"asked for {asked}, but TensorRT has built layers of 1 " in capsys.readouterr().err
    assert list(path.parent.iterdir()) == [path]


def test_parts_in_fp32_are_as_it_should_be_but_fp32_stays_fp32(graph: Callable[..., Path]) -> None:
    mixed = [
        EngineLayer(name, "correlation", precision, (1,), True) for name, precision in (("a", "fp16"), ("b", "fp32"))
    ]
    check_precision(read_onnx_file(graph(precision="fp16")), mixed)
    check_precision(read_onnx_file(graph()), [mixed[1], EngineLayer("c", "gemm", "other", (1,), True)])
    with pytest.raises(DataError, match="asked for fp32, but TensorRT has built layers of 1 fp16, 1 fp32"):
        check_precision(read_onnx_file(graph()), mixed)


def test_a_dynamic_graph_is_inspected_at_its_usual_shape(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT]
) -> None:
    trt = board(FakeTensorRT(shape=(-1, 32, 64, 3)))
    path = graph(batch=None)
    sidecar, _ = build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda")
    shapes = [(batch, 32, 64, 3) for batch in (1, 4, 8)]
    assert trt.config.profiles == [("images", *shapes)] and trt.context_shapes == [shapes[1]]
    assert sidecar.profile is not None and sidecar.profile.max == [8, 32, 64, 3]


def build(path: Path, trt: FakeTensorRT, **options: Any) -> BuildResult:
    return builder.build_plan(trt, read_onnx_file(path), BuildOptions(**options), TrtLog())


def test_compatible_engines(graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = FakeTensorRT()
    build(graph(), trt, compatible=("hardware", "version"))
    assert trt.config.flags == ["version"] and trt.config.hardware_compatibility_level == "ampere+"  # type: ignore[attr-defined]
    monkeypatch.setattr(bindings, "JETSON", tmp_path)
    with pytest.raises(UsageError, match="--compatible hardware: not on a Jetson"):
        build(graph(), FakeTensorRT(), compatible=("hardware",))


def test_dla(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT("Half")
    build(graph(precision="fp16"), trt, dla=0)
    config: Any = trt.config
    assert (config.default_device_type, config.DLA_core, config.flags) == ("dla", 0, ["fallback"])


@pytest.mark.parametrize(
    ("precision", "shape", "core", "kind", "words"),
    [
        ("fp16", (1, 32, 64, 3), 1, UnavailableError, r"--dla 1: TensorRT 10.3.0 finds 1 accelerator\(s\) here"),
        ("fp32", (1, 32, 64, 3), 0, UsageError, "--dla 0: runs fp16 and int8, .* is fp32"),
        ("fp16", (-1, 32, 64, 3), 0, UsageError, "--dla 0: the accelerator runs one shape only"),
    ],
)
def test_dla_that_cannot_be(
    graph: Callable[..., Path], precision: str, shape: tuple[int, ...], core: int, kind: type[HkdError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        build(graph(precision=precision), FakeTensorRT(shape=shape), dla=core)


def test_a_timing_cache_is_read_and_written(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], tmp_path: Path
) -> None:
    cache = tmp_path / "orin.cache"
    for rounds in (1, 2):
        board(FakeTensorRT())
        assert main([str(graph()), "--trt", "--timing-cache", str(cache)]) == 0
        assert cache.read_bytes() == rounds * b"measured"


def test_a_timing_cache_that_cannot_be_written_does_not_cost_the_engine(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board(FakeTensorRT())
    path, cache = graph(), tmp_path / "a file" / "orin.cache"
    cache.parent.write_text("no folder")
    assert main([str(path), "--trt", "--timing-cache", str(cache)]) == 2
    engine = path.with_suffix(".engine")
    assert read_plan(engine, read_engine_info(engine)) == b"plan"
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-export: "))
    assert f"--timing-cache {cache}: cannot be written (" in line and f"the engine is there: {engine}" in line


@pytest.mark.parametrize("content", [b"of another GPU", b"of another TensorRT"])
def test_a_timing_cache_of_another_machine_is_kept(graph: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "l4.cache"
    cache.write_bytes(content)
    with pytest.raises(UsageError, match=r"--timing-cache .*l4\.cache: of another GPU or TensorRT.*name another file"):
        build(graph(), FakeTensorRT(), timing_cache=cache)
    assert cache.read_bytes() == content


def test_a_build_that_fails_says_tensorrts_reason(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT()
    trt.plan = None
    with pytest.raises(DataError, match=r"cannot build it: Error Code 1: Myelin \(no tactics\)$"):
        build(graph(), trt)


def test_an_engine_that_does_not_open_is_not_written(
    graph: Callable[..., Path], board: Callable[..., FakeTensorRT]
) -> None:
    board(FakeTensorRT(opens=False))
    path = graph()
    with pytest.raises(DataError, match="built but does not open: wrong tag"):
        build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda")
    assert list(path.parent.iterdir()) == [path]


def test_a_gpu_that_is_not_there(graph: Callable[..., Path], board: Callable[..., FakeTensorRT]) -> None:
    board(FakeTensorRT())
    path = graph()
    with pytest.raises(UnavailableError, match=r"--device cuda:1: this machine has 1 GPU"):
        build_engine(read_onnx_file(path), path.with_suffix(".engine"), BuildOptions(), "cuda:1")


def test_a_builder_that_does_not_start(graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeTensorRT, logger: Any) -> Any:  # noqa: ARG001
        logger.log("ERROR", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(FakeTensorRT, "Builder", refuse)
    with pytest.raises(UnavailableError, match=r"does not start: CUDA initialization failure .* needs an NVIDIA GPU"):
        build(graph(), FakeTensorRT())


@pytest.mark.parametrize(("version", "newest"), [("10.3.0", 20), ("10.12.0", 20), ("10.13.2", 24), ("11.4.0.106", 24)])
def test_an_opset_too_new(graph: Callable[..., Path], version: str, newest: int) -> None:
    import onnx

    path, trt = graph(), FakeTensorRT()
    trt.__version__ = version  # type: ignore[misc]
    model = onnx.load(path)
    for opset in (newest, newest + 1):
        model.opset_import[0].version = opset
        path.write_bytes(model.SerializeToString())
        if opset == newest:
            build(path, trt)
            continue
        with pytest.raises(
            DataError, match=f"opset {opset} is too new for TensorRT {version}, which knows up to {newest}"
        ):
            build(path, trt)


def test_tensorrt_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="TensorRT is not installed; "):
        bindings.import_tensorrt()
    old: Any = SimpleNamespace(__version__="8.6.2.3")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(UnavailableError, match=r"TensorRT 8\.6\.2\.3 is too old: from 10\.0 on"):
        bindings.import_tensorrt()


def test_tensorrt_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"lib{name}.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UnavailableError, match=r"does not load: libtensorrt\.so\.10: cannot open shared object file; "):
        bindings.import_tensorrt()


@pytest.mark.parametrize(
    ("system", "machine", "jetson", "words"),
    [
        ("Linux", "aarch64", True, "sudo apt install python3-libnvinfer"),
        ("Linux", "x86_64", False, "pip install tensorrt"),
        ("Linux", "aarch64", False, "pip install tensorrt"),
        ("Darwin", "arm64", False, "not on Darwin arm64"),
        ("Windows", "AMD64", False, "not on Windows AMD64"),
    ],
)
def test_how_to_install(system: str, machine: str, jetson: bool, words: str) -> None:
    assert words in bindings._format_install_hint(system, machine, jetson)


def test_a_profile_wish_reaches_the_builder(graph: Callable[..., Path]) -> None:
    trt = FakeTensorRT(shape=(-1, 32, 64, 3))
    built = build(graph(batch=None), trt, profile=parse_profile("1,2,3"))
    assert built.profile == Profile((1, 32, 64, 3), (2, 32, 64, 3), (3, 32, 64, 3))
    assert built.layer_counts == {"CAST": 1, "CONVOLUTION": 1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--check"], "--check: belongs to --trt"),
        (["--openvino", "--imgsz", "320x256"], "--imgsz: "),
        (["--trt", "--dynamic", "batch"], "is finished; give the best.pt that it was made of"),
        (["--openvino", "--layers"], "--layers: belongs to --trt"),
        (["--precision", "int8", "--device", "cuda"], "--device: belongs to --trt"),
        (["--openvino", "--max-batch", "4"], "--max-batch: belongs to --target"),
        (["--openvino", "--conf", "0.5"], "--conf: belongs to --precision"),
        (["--openvino", "--output", "x.onnx"], "--output x.onnx: no .onnx file is written of "),
        (["--trt", "--workspace", "0"], "--workspace 0: at least 1 MiB"),
        (["--trt", "--dla", "-1"], "--dla -1: a core's number"),
        (["--trt", "--profile", "8"], "--profile 8: expected smallest,usual,largest"),
        (["--trt", "--output", "x.plan"], "--output x.plan: must end in .onnx, or in .engine"),
        (["--trt", "--check", "--output", "x.engine"], "--output x.engine: an engine is written by --trt, without"),
        (["--target", "triton", "--trt"], "two steps"),
        ([], "is ONNX already; say what to make of it"),
    ],
)
def test_flags_that_make_no_sense(
    graph: Callable[..., Path], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(graph()), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_words_for_a_histogram() -> None:
    assert (
        engine_file.format_counts({"int8": 40, "fp16": 7}) == "40 int8, 7 fp16"
        and engine_file.format_counts({}) == "none"
    )


# What the make-believe TensorRT above answers to, by class.
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
CLASSES = """
import json, sys
import tensorrt as trt
print(json.dumps([f"{kind}.{name}" for kind, names in json.loads(sys.argv[1]).items() for name in names
                  if not hasattr(getattr(trt, kind), name)]))
"""


@pytest.mark.slow
def test_tensorrt_has_all_that_is_asked_of_it(tensorrt_python: Path) -> None:
    command = [str(tensorrt_python), "-c", CLASSES, json.dumps(USED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
