"""Miss rate of a model on a dataset: `python examples/evaluate_model.py MODEL.onnx DATA.yaml`."""

import sys

from hkd_deploy import open_detector
from hkd_det.datasets.catalog import load_dataset
from hkd_det.metrics.citypersons import evaluate_detections


def main(model: str, data: str) -> None:
    """Print MR^-2 of each CityPersons setup that has ground truth."""
    samples = load_dataset(data, "val")
    detections = open_detector(model, device="cpu")([sample.path for sample in samples])
    for setup, result in evaluate_detections(samples, detections).items():
        if result.num_gt:
            print(f"{setup:<22} MR^-2 {100 * result.value:6.2f} %  ({result.num_gt} persons)")


if __name__ == "__main__":
    main(*sys.argv[1:3])
