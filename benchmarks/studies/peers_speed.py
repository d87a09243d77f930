"""CPU latency of the student compared with small YOLO models, from image to detections.

    python benchmarks/studies/peers_speed.py --data DATA.yaml --student runs/x/best.pt [--rounds 10] [--threads 2]

All models run at 640x512 on the same images, with ONNX Runtime and OpenVINO, in FP32, bfloat16 (OpenVINO) and INT8. The
YOLO models are built from Ultralytics' definitions with random weights. The speed does not depend on the weights, but
few boxes exceed `conf`, so NMS takes almost no time. This favors the YOLO models. Letterbox, normalization and
postprocessing are included for all models. All INT8 models come from the quantizer of hkd-export with the maximum
values of the calibration images; their accuracy is not measured here.

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
from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.external import OpenVinoSession
from hkd_deploy.model_metadata import ExportOptions
from hkd_deploy.precision.graph import find_graph_regions
from hkd_deploy.precision.int8 import convert_to_int8, fold_norms
from hkd_deploy.precision.model import run_model
from hkd_det.datasets import read_image
from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import write_text
from hkd_det.letterbox import Letterbox
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.onnxrt.model_config import OnnxModelConfig, normalize_input
from hkd_det.onnxrt.session import open_session

SIZE_HW = (512, 640)
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
torch.onnx.export(net, (torch.zeros(1, 3, 512, 640),), sys.argv[2], opset_version=17, dynamo=False,
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


def main() -> None:
    """Build, quantize and time all models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data YAML with the splits train and test")
    parser.add_argument("--student", type=Path, required=True, help="best.pt of the student")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the runtime (default: all)")
    parser.add_argument("--work", type=Path, default=Path("runs/peers_speed"), help="directory of the model files")
    parser.add_argument("--results", type=Path, help="file to which the table is written as well")
    arguments = parser.parse_args()
    images = [read_image(sample.path) for sample in load_dataset(str(arguments.data), "test")[:NUM_IMAGES]]
    files = build_models(arguments.student, arguments.data, arguments.work)
    entries = time_models(files, images, arguments.rounds, arguments.threads)
    table = format_page(entries, arguments.threads)
    print(table)
    if arguments.results:
        write_text(arguments.results, table)


def build_models(student: Path, data: Path, folder: Path) -> dict[tuple[str, str], Path]:
    """Build the model files; existing files are kept.

    Args:
        student: Checkpoint of the student.
        data: Data YAML; the split train is used for calibration.
        folder: Directory of the model files.

    Returns:
        The files by (model, precision).
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    calibration = [read_image(sample.path) for sample in load_dataset(str(data), "train")[:NUM_CALIBRATION_IMAGES]]
    for name in ("student", *PEERS):
        fp32, int8 = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
        if not fp32.exists() and name == "student":
            export_onnx(load_detector_checkpoint(student), fp32, ExportOptions(SIZE_HW))
        elif not fp32.exists():
            subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD_PEER, name, str(fp32)], check=True)
        if not int8.exists():
            write_int8(fp32, int8, [prepare_input(name, image) for image in calibration])
        files |= {(name, "fp32"): fp32, (name, "bf16"): fp32, (name, "int8"): int8}
    return files


def prepare_input(name: str, image: Image) -> NDArray[Any]:
    """Return a batch of one in the input format of a model.

    Args:
        name: Name of the model.
        image: uint8 [H, W, 3], RGB.
    """
    size_hw = (image.shape[0], image.shape[1])
    if name == "student":
        return Letterbox(size_hw, SIZE_HW).apply(image)[None]
    config = PEERS[name]
    letterbox = Letterbox(size_hw, SIZE_HW, config.resize_mode, config.pad_value, interpolation="linear")
    return normalize_input(letterbox.apply(image)[None], config, np.float32)


def write_int8(fp32: Path, int8: Path, inputs: Sequence[NDArray[Any]]) -> None:
    """Quantize all layers except the last, with the maximum input value of each layer.

    Args:
        fp32: The FP32 model file.
        int8: File to write.
        inputs: Calibration inputs.
    """
    model = fold_norms(onnx.load(fp32))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    layers = find_graph_regions(model).layers
    names = sorted({node.input[0] for node in model.graph.node if node.name in set(layers)})
    max_values = dict.fromkeys(names, 0.0)
    for outputs in run_model(model, names, inputs):
        for name, values in outputs.items():
            max_values[name] = max(max_values[name], float(np.abs(values).max()))
    onnx.save(convert_to_int8(model, layers, max_values), int8)


def open_model(stack: ExitStack, name: str, path: Path, runtime: str, threads: int) -> Callable[[Image], Any]:
    """Return a function from an image to its detections.

    Args:
        stack: Closes the model.
        name: Name of the model.
        path: The model file.
        runtime: Name of the runtime.
        threads: Threads of the runtime.
    """
    if name == "student":
        return stack.enter_context(open_detector(path, "cpu", threads, runtime))
    if runtime == "onnxruntime":
        # The same option as for the student, because the same quantizer produced all INT8 models.
        session: Any = open_session(path, "cpu", threads, disable_quant_qdq=True)
    else:
        session = OpenVinoSession(path, "cpu", threads, "bf16" if runtime == "openvino-bf16" else None)
    model = OnnxDetector(path, session, PEERS[name])
    return lambda image: model([image])


def time_models(
    files: dict[tuple[str, str], Path], images: Sequence[Image], rounds: int, threads: int
) -> list[LatencySeries]:
    """Time every model in every precision on every runtime that supports it, alternately.

    Args:
        files: Model files by (model, precision).
        images: Images to run.
        rounds: Number of rounds.
        threads: Threads of the runtimes.
    """
    with ExitStack() as stack:
        entries = [
            (LatencySeries(model, precision, runtime, []), open_model(stack, model, path, runtime, threads))
            for (model, precision), path in files.items()
            for runtime in RUNTIMES[precision]
        ]
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


def format_page(entries: Sequence[LatencySeries], threads: int) -> str:
    """Return the Markdown page with one row per runtime and precision.

    Args:
        entries: The latencies.
        threads: Threads of the runtimes.
    """
    processor = next(field.value for field in read_host_fields() if field.name == "CPU")
    runs = len(entries[0].ms)
    lines = [
        "# CPU latency compared with small YOLO models",
        "",
        "Latency of the student and of three YOLO models from image to detections.",
        "",
        f"```bash\n{' '.join(['python', *sys.argv])}\n```",
        "",
        f"{processor}, {threads} threads, images at {SIZE_HW[1]}x{SIZE_HW[0]}. "
        f"Milliseconds, median of {runs} runs (p10-p90).",
        "",
        f"| runtime | precision | student | {' | '.join(PEERS)} | student / fastest YOLO | student / its FP32 |",
        f"|{' --- |' * (len(PEERS) + 5)}",
    ]
    for runtime, precision in list_cells():
        row = {e.model: e for e in entries if (e.runtime, e.precision) == (runtime, precision)}
        of_fp32 = next(
            e.p50_ms
            for e in entries
            if (e.model, e.precision, e.runtime) == ("student", "fp32", runtime.removesuffix("-bf16"))
        )
        student = row["student"].p50_ms
        fastest = min(row[peer].p50_ms for peer in PEERS)
        times = [_format_time(row[name]) for name in ("student", *PEERS)]
        lines.append(
            f"| {runtime} | {precision} | {' | '.join(times)} | {student / fastest:.2f} | {student / of_fp32:.2f} |"
        )
    return "\n".join(lines) + "\n"


def list_cells() -> Iterator[tuple[str, str]]:
    """Yield the runtime and precision of each row."""
    for precision, runtimes in RUNTIMES.items():
        for runtime in runtimes:
            yield runtime, precision


def _format_time(entry: LatencySeries) -> str:
    low, high = np.percentile(entry.ms, [10, 90])
    return f"{entry.p50_ms:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
