"""Tests of `benchmarks/studies/gpu_check.py`: processes, limits, exit codes, and a rehearsal of cheap steps."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.backends.tensorrt import AsyncQueue
from hkd_det.errors import DataError

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
# Replaces gpu_check_steps.py: each name is one behavior of a step.
FAKE_STEPS = """
import json, os, pathlib, subprocess, sys, time
name, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
def write(**content): pathlib.Path(out).write_text(json.dumps(content))
if name == "passes": write(values={"p50_ms": 1.5, "share of roofline": 0.25, "GPU": "<b>x</b>"})
elif name == "fails": print("first line\\nlast line"); write(error="boxes differ. Report it.")
elif name == "skips": write(skipped="not installed")
elif name == "crashes": print("about to crash", flush=True); os.abort()
elif name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(out).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
elif name == "ignores":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(out).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STUDIES))  # as for a script in this directory
    try:
        spec = importlib.util.spec_from_file_location("gpu_check", STUDIES / "gpu_check.py")
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules["gpu_check"] = loaded  # for its dataclasses
        spec.loader.exec_module(loaded)
        yield loaded
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture
def study(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study with the steps of `FAKE_STEPS`."""
    script = tmp_path / "steps.py"
    script.write_text(FAKE_STEPS)
    make_step = type(module.STEPS["images"])
    names = ("passes", "fails", "skips", "crashes", "hangs", "ignores")
    steps = {name: make_step(name, print, 3 if name in ("hangs", "ignores") else 20) for name in names}
    steps["gpu"] = make_step("gpu", print, 20, requires_gpu=True)
    steps["package"] = make_step("package", print, 20, packages=("json", "no_such_package"))
    monkeypatch.setattr(module, "STEPS_FILE", script)
    monkeypatch.setattr(module, "STEPS", steps)
    monkeypatch.setattr(module, "require_gpu", lambda _: None)
    return module


def run(study: ModuleType, tmp_path: Path, steps: str, device: str = "cpu") -> tuple[int, dict[str, tuple[str, str]]]:
    """Return the exit code, and status and reason of each step."""
    code = study.main(["--device", device, "--output", str(tmp_path / "out"), "--steps", steps])
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert content["is_rehearsal"] == (device == "cpu") and content["schema"] == 1
    return code, {step["name"]: (step["status"], step["reason"]) for step in content["steps"]}


def test_failed_step_does_not_stop_the_others(study: ModuleType, tmp_path: Path) -> None:
    code, steps = run(study, tmp_path, "fails,crashes,passes,gpu,package,skips")
    assert code == 1 and steps == {
        "fails": ("failed", "boxes differ. Report it."),
        "crashes": ("failed", "the process ended with exit code -6"),
        "passes": ("passed", ""),
        "gpu": ("skipped", "requires an NVIDIA GPU"),
        "package": ("skipped", "not installed: no_such_package"),
        "skips": ("skipped", "not installed"),
    }
    page = (tmp_path / "out" / "gpu_check.html").read_text()
    assert "last line" in page and "about to crash" in page and "&lt;b&gt;x" in page and "<b>x" not in page
    assert "1.5 ms" in page and "25.0 %" in page and "rehearsal without a GPU" in page


def test_skipped_step_passes_only_the_rehearsal(study: ModuleType, tmp_path: Path) -> None:
    assert run(study, tmp_path, "passes,gpu,skips")[0] == 0
    assert run(study, tmp_path, "passes,skips", "cuda")[0] == 1
    assert run(study, tmp_path, "passes", "cuda")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hangs", "ignores"])
def test_step_over_its_limit_ends_with_its_processes(
    study: ModuleType, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TERMINATE_S", 1.0)
    code, steps = run(study, tmp_path, name)
    assert code == 1 and steps == {name: ("failed", "did not finish within 3 s")}
    for pid in map(int, (tmp_path / "out" / "work" / "pids").read_text().split()):
        deadline = time.monotonic() + 5
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_total_limit_fails_the_remaining_steps(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TOTAL_LIMIT_S", 0.0)
    assert run(study, tmp_path, "passes") == (1, {"passes": ("failed", "not started: 0 s are over")})


def test_result_of_an_earlier_run_is_not_used(study: ModuleType, tmp_path: Path) -> None:
    assert run(study, tmp_path, "passes")[0] == 0
    (tmp_path / "steps.py").write_text("")
    assert run(study, tmp_path, "passes")[1]["passes"] == ("failed", "the process ended with exit code 0")


def test_no_gpu_gives_one_line(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert module.main([]) == 1
    assert capsys.readouterr().err.startswith("gpu_check.py: --device cuda: no NVIDIA GPU (")
    assert module.main(["--steps", "x", "--device", "cpu"]) == 2
    assert "--steps x: expected a step of environment, images" in capsys.readouterr().err


def test_gpu_steps_are_never_run_without_a_gpu(module: ModuleType) -> None:
    gpu_steps = {name for name, step in module.STEPS.items() if module.find_skip_reason(step, "cpu")}
    assert {
        "onnxruntime-cuda", "ort-tensorrt", "engine-build", "tensorrt", "int8-engine", "cuda-graph", "async-queue",
    } <= gpu_steps  # fmt: skip


@pytest.mark.slow
def test_rehearsal_measures_a_training_step_and_a_backend(module: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = module.main(
        ["--device", "cpu", "--output", str(tmp_path), "--steps", "images,onnxruntime-cpu,train-distilled,tensorrt"]
    )
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    steps = {step["name"]: step for step in content["steps"]}
    assert code == 0, [step["reason"] for step in content["steps"]]
    assert [step["status"] for step in content["steps"]] == ["passed", "passed", "passed", "skipped"]
    values = steps["onnxruntime-cpu"]["values"]
    assert values["box difference_px"] < 0.5 and values["compared detections"] > 0 and values["p50_ms"] > 0
    assert 0 < steps["train-distilled"]["values"]["share of roofline"] < 1


@pytest.fixture
def steps(module: ModuleType) -> ModuleType:
    """The steps of the study."""
    assert module.STEPS
    return sys.modules["gpu_check_steps"]


@pytest.mark.slow
def test_model_that_detects_nothing_has_no_share(
    steps: ModuleType, write_tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    """The tiny model detects the box of all bright pixels, which is no person of hkd-cpu."""
    context = steps.StepContext("cpu", tmp_path)
    steps.write_images(context)
    samples = steps.load_dataset(context.data, "val")
    tiny = write_tiny_onnx(tmp_path / "tiny.onnx")
    assert steps.measure_detected(steps.resolve_model(steps.MODEL), "cpu", "onnxruntime", samples) == 1
    assert steps.measure_detected(tiny, "cpu", "onnxruntime", samples) < steps.MIN_DETECTED


class FakeRequest:
    """A request whose outputs are the sum of its batch, plus an error."""

    def __init__(self, error: float) -> None:
        self.error = error

    def start_async(self, images: NDArray[np.uint8]) -> None:
        self.total = float(images.sum(dtype=np.float64))

    def wait(self) -> tuple[NDArray[np.float32], ...]:
        outputs = np.full((1, 1, 4), self.total + self.error), np.ones((1, 1)), np.ones(1)
        return tuple(one.astype(np.float32) for one in outputs)


class FakeBackend:
    """An engine that runs on `FakeRequest`; those of the queue and those of a CUDA graph can be wrong."""

    def __init__(self, error: float, queue_error: float) -> None:
        self.request, self.queue_error = FakeRequest(error), queue_error

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        self.request.start_async(images)
        return self.request.wait()

    @contextmanager
    def open_async_queue(self, num_requests: int) -> Iterator[AsyncQueue]:
        requests: list[Any] = [FakeRequest(self.queue_error) for _ in range(num_requests)]
        yield AsyncQueue(requests)


@pytest.mark.parametrize(("graph_error", "queue_error"), [(0, 0), (1e4, 0), (0, 1e4)])
def test_graph_and_queue_must_have_the_outputs_of_plain_runs(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph_error: float, queue_error: float
) -> None:
    @contextmanager
    def open_fake(path: Path, device: str, use_cuda_graph: bool = True) -> Iterator[FakeBackend]:
        assert path.name == "fp32.engine" and device == "cuda"
        yield FakeBackend(graph_error if use_cuda_graph else 0, graph_error + queue_error)

    monkeypatch.setattr("hkd_deploy.backends.tensorrt.open_tensorrt", open_fake)
    context = steps.StepContext("cuda", tmp_path)
    for check, is_wrong in ((steps.check_cuda_graph, graph_error), (steps.check_async_queue, queue_error)):
        if is_wrong:
            with pytest.raises(DataError, match="differ by 1e\\+04 from a plain run"):
                check(context)
        else:
            assert all(value > 0 for value in check(context).values())
