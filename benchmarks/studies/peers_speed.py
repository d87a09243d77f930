"""CPU latency of students compared with small YOLO models at one input size, from image to detections.

    python benchmarks/studies/peers_speed.py --data DATA.yaml [--students hkd-cpu] [--imgsz 320x320] [--rounds 10]

All models run on the same images, with ONNX Runtime and OpenVINO, in FP32, bfloat16 (OpenVINO) and INT8. The YOLO
models are built from Ultralytics' definitions with random weights at --imgsz and at --larger-imgsz. The speed does not
depend on the weights, but few boxes exceed `conf`, so NMS takes almost no time. This favors the YOLO models. Letterbox,
normalization and postprocessing are included for all models. All INT8 models come from the quantizer of hkd-export with
the maximum values of the calibration images; their accuracy is not measured here.

A round runs every model `BURST` times in sequence, as with a camera, after a pause and warmup calls. The pause is
needed because the threads of ONNX Runtime spin for a while and would slow down the next model. The table gives medians
over all rounds.
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
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_deploy import open_detector
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.graph import find_graph_regions, fold_norms
from hkd_deploy.precision.int8 import convert_to_int8
from hkd_deploy.precision.model import run_model
from hkd_det.datasets import read_image
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.letterbox import Letterbox, parse_imgsz
from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.onnxrt.model_config import OnnxModelConfig, normalize_input
from hkd_det.onnxrt.openvino import OpenVinoSession
from hkd_det.onnxrt.session import open_session
from hkd_det.shipped import resolve_model

NUM_CALIBRATION_IMAGES, NUM_IMAGES = 48, 16
BURST, NUM_WARMUP, PAUSE_S = 8, 3, 0.1
PEERS = {
    "yolo26n": OnnxModelConfig("yolo-e2e", resize_mode="center", input_scale=1.0, conf=0.25),
    "yolo11n": OnnxModelConfig("yolo-raw", resize_mode="center", input_scale=1.0, conf=0.25, iou=0.7),
    "yolov8n": OnnxModelConfig("yolo-raw", resize_mode="center", input_scale=1.0, conf=0.25, iou=0.7),
}
RUNTIMES = {"fp32": ("onnxruntime", "openvino"), "bf16": ("openvino-bf16",), "int8": ("onnxruntime", "openvino")}

# Runs in its own process: importing ultralytics changes the number of threads, also those of OpenCV.
BUILD_PEER = """
import sys, torch
from ultralytics import YOLO
net = YOLO(sys.argv[1] + ".yaml").model.eval()
head = net.model[-1]
if getattr(head, "one2one_cv2", None) is not None:
    head.end2end = True  # YOLO26 is deployed without NMS
net = net.fuse()
for module in net.modules():
    if hasattr(module, "export"):
        module.export, module.format = True, "onnx"
size = [int(side) for side in sys.argv[3:]]
torch.onnx.export(net, (torch.zeros(1, 3, *size),), sys.argv[2], opset_version=17, dynamo=False,
                  input_names=["images"], output_names=["output0"])
"""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class LatencySeries:
    """Latencies of one model in one precision on one runtime.

    Attributes:
        model: Name of the model.
        precision: "fp32", "bf16" or "int8".
        runtime: Name of the runtime.
        ms: Milliseconds per image.
    """

    model: str
    precision: str
    runtime: str
    ms: list[float]

    @property
    def p50_ms(self) -> float:
        """Median latency, ms."""
        return float(np.median(self.ms))


@dataclass(frozen=True)
class TimedModel:
    """A model to time.

    Attributes:
        label: Name in the table.
        path: FP32 ONNX file.
        imgsz_hw: Input height and width, pixels.
        config: Input and output format of a YOLO model; None for a student.
    """

    label: str
    path: Path
    imgsz_hw: tuple[int, int]
    config: OnnxModelConfig | None = None

    def prepare_input(self, image: Image) -> NDArray[Any]:
        """Return a batch of one in the input format of the model.

        Args:
            image: uint8 [H, W, 3], RGB.
        """
        size_hw = (image.shape[0], image.shape[1])
        if self.config is None:
            return Letterbox(size_hw, self.imgsz_hw).apply(image)[None]
        letterbox = Letterbox(
            size_hw, self.imgsz_hw, self.config.resize_mode, self.config.pad_value, interpolation="linear"
        )
        return normalize_input(letterbox.apply(image)[None], self.config, np.float32)


def main() -> None:
    """Build, quantize and time all models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data YAML with the splits train and test")
    parser.add_argument(
        "--students", default="hkd-cpu", help="shipped models or FP32 files of hkd-export (default: %(default)s)"
    )
    parser.add_argument("--imgsz", default="320x320", help="input of the YOLO models (default: %(default)s)")
    parser.add_argument(
        "--larger-imgsz", default="416x416", help="second input of the YOLO models (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the runtime (default: all)")
    parser.add_argument("--work", type=Path, default=Path("runs/peers_speed"), help="directory of the model files")
    parser.add_argument("--results", type=Path, help="file to which the table is written as well")
    arguments = parser.parse_args()
    images = [read_image(sample.path) for sample in load_dataset(str(arguments.data), "test")[:NUM_IMAGES]]
    arguments.work.mkdir(parents=True, exist_ok=True)
    models = list_students(arguments.students.split(","))
    for imgsz in (arguments.imgsz, arguments.larger_imgsz):
        models += [build_peer(name, parse_imgsz(imgsz), arguments.work) for name in PEERS]
    calibration = [
        read_image(sample.path) for sample in load_dataset(str(arguments.data), "train")[:NUM_CALIBRATION_IMAGES]
    ]
    for model in models:
        write_int8(model, get_int8_path(model, arguments.work), calibration)
    entries = time_models(models, arguments.work, images, arguments.rounds, arguments.threads)
    table = format_page(models, entries, arguments.threads)
    print(table)
    if arguments.results:
        write_text(arguments.results, table)


def list_students(names: Sequence[str]) -> list[TimedModel]:
    """Return students given as names of shipped models or as files."""
    students = []
    for path in (resolve_model(name.strip()) for name in names):
        properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        students.append(TimedModel(path.stem, path, ModelMetadata.from_metadata(properties, path).imgsz_hw))
    return students


def build_peer(name: str, imgsz_hw: tuple[int, int], folder: Path) -> TimedModel:
    """Build a YOLO model with random weights; an existing file is kept."""
    height, width = imgsz_hw
    path = folder / f"{name}-{width}x{height}.onnx"
    if not path.exists():
        command = [sys.executable, "-W", "ignore", "-c", BUILD_PEER, name, str(path), str(height), str(width)]
        subprocess.run(command, check=True)
    return TimedModel(f"{name} {width}x{height}", path, imgsz_hw, PEERS[name])


def get_int8_path(model: TimedModel, folder: Path) -> Path:
    """Return the file of the INT8 form of a model."""
    return folder / f"{model.path.stem}.int8.onnx"


def write_int8(timed: TimedModel, path: Path, images: Sequence[Image]) -> None:
    """Quantize all layers except the last, with the maximum input value of each layer.

    Args:
        timed: The FP32 model.
        path: File to write; an existing file is kept if it is newer than the model.
        images: Calibration images.
    """
    if path.exists() and path.stat().st_mtime > timed.path.stat().st_mtime:
        return
    inputs = [timed.prepare_input(image) for image in images]
    model = fold_norms(onnx.load(timed.path))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    layers = find_graph_regions(model).layers
    names = sorted({node.input[0] for node in model.graph.node if node.name in set(layers)})
    max_values = dict.fromkeys(names, 0.0)
    for outputs in run_model(model, names, inputs):
        for name, values in outputs.items():
            max_values[name] = max(max_values[name], float(np.abs(values).max()))
    onnx.save(convert_to_int8(model, layers, max_values), path)


def open_model(stack: ExitStack, model: TimedModel, path: Path, runtime: str, threads: int) -> Callable[[Image], Any]:
    """Return a function from an image to its detections.

    Args:
        stack: Closes the model.
        model: The model.
        path: Its file in the precision to time.
        runtime: Name of the runtime.
        threads: Threads of the runtime.
    """
    if model.config is None:
        return stack.enter_context(open_detector(path, "cpu", threads, runtime))
    if runtime == "onnxruntime":
        # The same option as for the student, because the same quantizer produced all INT8 models.
        session: Any = open_session(path, "cpu", threads, disable_quant_qdq=True)
    else:
        session = OpenVinoSession(path, "cpu", threads, "bf16" if runtime == "openvino-bf16" else None)
    detector = OnnxDetector(path, session, model.config)
    return lambda image: detector([image])


def time_models(
    models: Sequence[TimedModel], folder: Path, images: Sequence[Image], rounds: int, threads: int
) -> list[LatencySeries]:
    """Time every model in every precision on every runtime that supports it, alternately.

    Args:
        models: The models.
        folder: Directory of their INT8 forms.
        images: Images to run.
        rounds: Number of rounds.
        threads: Threads of the runtimes.
    """
    with ExitStack() as stack:
        entries = []
        for precision, runtime in list_cells():
            for model in models:
                path = get_int8_path(model, folder) if precision == "int8" else model.path
                detect = open_model(stack, model, path, runtime, threads)
                entries.append((LatencySeries(model.label, precision, runtime, []), detect))
        for _ in tqdm(range(rounds), "timing", unit="round"):
            for entry, detect in entries:
                sleep(PAUSE_S)
                for number in range(-NUM_WARMUP, BURST):
                    image = images[number % len(images)]
                    start = perf_counter()
                    detect(image)
                    if number >= 0:
                        entry.ms.append(1e3 * (perf_counter() - start))
    return [entry for entry, _ in entries]


def format_page(models: Sequence[TimedModel], entries: Sequence[LatencySeries], threads: int) -> str:
    """Return the Markdown page with one row per model, runtime and precision.

    Args:
        models: Students, then YOLO models at the first and at the second input size.
        entries: The latencies.
        threads: Threads of the runtimes.
    """
    processor = next(field.value for field in read_host_fields() if field.name == "CPU")
    labels = [model.label for model in models if model.config]
    same, larger = labels[: len(PEERS)], labels[len(PEERS) :]
    lines = [
        "# CPU latency compared with small YOLO models",
        "",
        "Latency from image to detections. The ratios are those to the fastest YOLO model of the same row at "
        f"{same[0].split()[1]} and at {larger[0].split()[1]}.",
        "",
        f"```bash\n{' '.join(['python', *sys.argv])}\n```",
        "",
        f"{processor}, {threads} threads. Milliseconds, median of {len(entries[0].ms)} runs (p10-p90).",
        "",
        f"| model | runtime | precision | latency, ms | / YOLO {same[0].split()[1]} | / YOLO {larger[0].split()[1]} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for precision, runtime in list_cells():
        row = {e.model: e for e in entries if (e.runtime, e.precision) == (runtime, precision)}
        fastest = [min(row[label].p50_ms for label in peers) for peers in (same, larger)]
        for model in models:
            ratios = " | ".join(f"{row[model.label].p50_ms / ms:.2f}" for ms in fastest)
            lines.append(f"| {model.label} | {runtime} | {precision} | {_format_time(row[model.label])} | {ratios} |")
    return "\n".join(lines) + "\n"


def list_cells() -> Iterator[tuple[str, str]]:
    """Yield precision and runtime of each row."""
    for precision, runtimes in RUNTIMES.items():
        for runtime in runtimes:
            yield precision, runtime


def _format_time(entry: LatencySeries) -> str:
    low, high = np.percentile(entry.ms, [10, 90])
    return f"{entry.p50_ms:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
