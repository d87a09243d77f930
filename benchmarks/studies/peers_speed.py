"""Write small YOLO models as ONNX files, to compare their latency with that of the shipped students by hkd-bench.

    python benchmarks/studies/peers_speed.py DIR --imgsz 320 416
    hkd-bench hkd-cpu DIR/*.onnx --model-config yolov8,yolov8,yolo26,yolo26,yolov8,yolov8 --images IMAGES --threads 1 \
        --backend onnxruntime,openvino,openvino-bf16

The models are built from Ultralytics' definitions with random weights. The speed does not depend on the weights, but
few boxes exceed the score threshold, so NMS takes almost no time. This favors the YOLO models.
"""

import argparse
from pathlib import Path

import torch
from ultralytics import YOLO

MODELS = ("yolo26n", "yolo11n", "yolov8n")
OPSET = 17


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[320], help="square input sizes, pixels (default: 320)")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        for imgsz in arguments.imgsz:
            export_untrained(name, arguments.directory / f"{name}-{imgsz}.onnx", imgsz)


def export_untrained(name: str, path: Path, imgsz: int) -> None:
    """Export a YOLO model with random weights as it is deployed: YOLO26 without NMS, the others before NMS.

    Args:
        name: Name of the model.
        path: ONNX file to write.
        imgsz: Input height and width, pixels.
    """
    network = YOLO(f"{name}.yaml").model.eval()
    head = network.model[-1]
    if getattr(head, "one2one_cv2", None) is not None:
        head.end2end = True
    network = network.fuse()
    for module in network.modules():
        if hasattr(module, "export"):
            module.export, module.format = True, "onnx"
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, imgsz, imgsz),),
        str(path),
        input_names=["images"],
        output_names=["output0"],
        opset_version=OPSET,
        dynamo=False,
    )
    print(path)


if __name__ == "__main__":
    main()
