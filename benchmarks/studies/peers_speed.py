"""The student against the small YOLO models: from picture to people on this CPU, all in one run.

    python benchmarks/studies/peers_speed.py --student runs/x/best.pt [--rounds 10] [--threads 2] [--results FILE.md]

All at 640x512 on the same pictures, on ONNX Runtime and OpenVINO, in FP32, bfloat16 (OpenVINO) and INT8. The peers are
built from Ultralytics' definitions with fresh weights: speed does not depend on them, but hardly a box passes `conf`,
so suppression costs next to nothing, in the peers' favour. Letterbox, normalisation and postprocessing are counted for
all. INT8 is made of all by hkd-export's quantiser, by the largest values of the calibration; how well it sees is
another question, which hkd-export asks. A round runs every model `BURST` times in a row, as on a camera, after a pause
and some calls that are not timed: ONNX Runtime's threads spin for a while and would slow whoever comes next. Compared
are medians over all.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_deploy import open_detector
from hkd_deploy.backends.openvino import create_core
from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.precision.calibration import run_model
from hkd_deploy.precision.graph_regions import find_graph_regions
from hkd_deploy.precision.int8 import convert_to_int8, fold_norms
from hkd_det.datasets import read_image
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.letterbox import Letterbox
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.onnxrt.detector import OnnxDetector, normalize_input
from hkd_det.onnxrt.model_config import OnnxModelConfig
from hkd_det.onnxrt.session import open_session

HERE = Path(__file__).parent
DATA = HERE / "real_data.yaml"
SIZE_HW = (512, 640)
CALIBRATION, PICTURES = 48, 16
BURST, WARM_UP, PAUSE_S = 8, 3, 0.1
PEERS = {
    "yolo26n": OnnxModelConfig("yolo-e2e", resize_mode="center", input_scale=1.0, conf=0.25),
    "yolo11n": OnnxModelConfig("yolo-raw", resize_mode="center", input_scale=1.0, conf=0.25, iou=0.7),
    "yolov8n": OnnxModelConfig("yolo-raw", resize_mode="center", input_scale=1.0, conf=0.25, iou=0.7),
}
RUNTIMES = {"fp32": ("onnxruntime", "openvino"), "bf16": ("openvino-bf16",), "int8": ("onnxruntime", "openvino")}

# In a process of its own: at import ultralytics sets thread counts, OpenCV's too.
BUILD_PEER = """
import sys, torch
from ultralytics import YOLO
net = YOLO(sys.argv[1] + ".yaml").model.eval()
head = net.model[-1]
if getattr(head, "one2one_cv2", None) is not None:
    head.end2end = True  # YOLO26 as it is meant to be deployed: without suppression
net = net.fuse()
for module in net.modules():
    if hasattr(module, "export"):
        module.export, module.format = True, "onnx"
torch.onnx.export(net, (torch.zeros(1, 3, 512, 640),), sys.argv[2], opset_version=17, dynamo=False,
                  input_names=["images"], output_names=["output0"])
"""

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Entry:
    """One model in one precision on one runtime, and what it took, milliseconds a picture."""

    model: str
    precision: str
    runtime: str
    ms: list[float]

    @property
    def p50_ms(self) -> float:
        """Median."""
        return float(np.median(self.ms))


def main() -> None:
    """Build, quantise, time, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="best.pt")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("runs/peers_speed"), help="folder for the model files")
    parser.add_argument("--results", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    pictures = [read_image(sample.path) for sample in load_dataset(str(DATA), "test")[:PICTURES]]
    files = build(arguments.student, arguments.work)
    table = told(time_all(files, pictures, arguments.rounds, arguments.threads), arguments.threads)
    print(table)
    if arguments.results:
        write_text(arguments.results, table)


def build(student: Path, folder: Path) -> dict[tuple[str, str], Path]:
    """(model, precision) to file; what lies in the folder already is not built again."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    calibration = [read_image(sample.path) for sample in load_dataset(str(DATA), "train")[:CALIBRATION]]
    for name in ("student", *PEERS):
        fp32, int8 = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
        if not fp32.exists() and name == "student":
            export_onnx(load_detector_checkpoint(student), fp32, ExportOptions(SIZE_HW))
        elif not fp32.exists():
            subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD_PEER, name, str(fp32)], check=True)
        if not int8.exists():
            write_int8(fp32, int8, [as_fed(name, picture) for picture in calibration])
        files |= {(name, "fp32"): fp32, (name, "bf16"): fp32, (name, "int8"): int8}
    return files


def as_fed(name: str, picture: Picture) -> NDArray[Any]:
    """A batch of one, as the graph takes it."""
    size_hw = (picture.shape[0], picture.shape[1])
    if name == "student":
        return Letterbox(size_hw, SIZE_HW).apply(picture)[None]
    described = PEERS[name]
    letterbox = Letterbox(size_hw, SIZE_HW, described.resize_mode, described.pad_value, interpolation="linear")
    return normalize_input(letterbox.apply(picture)[None], described, np.float32)


def write_int8(fp32: Path, int8: Path, inputs: Sequence[NDArray[Any]]) -> None:
    """All layers but the last, by the largest value that enters each."""
    model = fold_norms(onnx.load(fp32))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    layers = find_graph_regions(model).layers
    names = sorted({node.input[0] for node in model.graph.node if node.name in set(layers)})
    reach = dict.fromkeys(names, 0.0)
    for found in run_model(model, names, inputs):
        for name, values in found.items():
            reach[name] = max(reach[name], float(np.abs(values).max()))
    onnx.save(convert_to_int8(model, layers, reach), int8)


class OpenVinoSession:
    """OpenVINO behind the few calls of ONNX Runtime's session that a ForeignModel makes."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads
        }  # fmt: skip
        self._compiled = create_core().compile_model(str(path), "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def get_inputs(self) -> list[SimpleNamespace]:
        """The one input."""
        return [SimpleNamespace(name="images", type="tensor(float)", shape=list(self._compiled.inputs[0].shape))]

    def get_outputs(self) -> list[SimpleNamespace]:
        """The one output."""
        return [SimpleNamespace(name="output0")]

    def run(self, names: Sequence[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One call."""
        self._request.infer(feeds, share_inputs=True)
        return [self._request.get_tensor(name).data for name in names]


def opened(stack: ExitStack, name: str, path: Path, runtime: str, threads: int) -> Callable[[Picture], Any]:
    """From a picture to its people."""
    if name == "student":
        return stack.enter_context(open_detector(path, "cpu", threads, runtime))
    if runtime == "onnxruntime":
        # As the student's, since the same quantiser has made the peers' INT8.
        session: Any = open_session(path, "cpu", threads, disable_quant_qdq=True)
    else:
        session = OpenVinoSession(path, "bf16" if runtime == "openvino-bf16" else "f32", threads)
    model = OnnxDetector(path, session, PEERS[name])
    return lambda picture: model([picture])


def time_all(files: dict[tuple[str, str], Path], pictures: Sequence[Picture], rounds: int, threads: int) -> list[Entry]:
    """Every model in every precision on every runtime that has it, in turn."""
    with ExitStack() as stack:
        entries = [
            (Entry(model, precision, runtime, []), opened(stack, model, path, runtime, threads))
            for (model, precision), path in files.items()
            for runtime in RUNTIMES[precision]
        ]
        for _ in tqdm(range(rounds), "timing", unit="round"):
            for entry, detect in entries:
                sleep(PAUSE_S)
                for number in range(-WARM_UP, BURST):
                    picture = pictures[number % len(pictures)]
                    start = perf_counter()
                    detect(picture)
                    if number >= 0:
                        entry.ms.append(1e3 * (perf_counter() - start))
    return [entry for entry, _ in entries]


def told(entries: Sequence[Entry], threads: int) -> str:
    """A Markdown table: a line a runtime and precision, what the student takes of the fastest peer, INT8 of FP32."""
    processor = next(fact.value for fact in read_host_fields() if fact.name == "CPU")
    runs = len(entries[0].ms)
    lines = [
        "# The student against small YOLO models, from picture to people",
        "",
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        f"{processor}, {threads} threads, pictures at {SIZE_HW[1]}x{SIZE_HW[0]}; milliseconds, median of",
        f"{runs} runs (p10-p90).",
        "",
        f"| runtime | precision | student | {' | '.join(PEERS)} | student / fastest peer | student / its FP32 |",
        f"|{' --- |' * (len(PEERS) + 5)}",
    ]
    for runtime, precision in cells():
        row = {e.model: e for e in entries if (e.runtime, e.precision) == (runtime, precision)}
        of_fp32 = next(
            e.p50_ms
            for e in entries
            if (e.model, e.precision, e.runtime) == ("student", "fp32", runtime.removesuffix("-bf16"))
        )
        student = row["student"].p50_ms
        fastest = min(row[peer].p50_ms for peer in PEERS)
        times = [_time(row[name]) for name in ("student", *PEERS)]
        lines.append(
            f"| {runtime} | {precision} | {' | '.join(times)} | {student / fastest:.2f} | {student / of_fp32:.2f} |"
        )
    return "\n".join(lines) + "\n"


def cells() -> Iterator[tuple[str, str]]:
    """Runtime and precision of each line."""
    for precision, runtimes in RUNTIMES.items():
        for runtime in runtimes:
            yield runtime, precision


def _time(entry: Entry) -> str:
    low, high = np.percentile(entry.ms, [10, 90])
    return f"{entry.p50_ms:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
