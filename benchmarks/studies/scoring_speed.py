"""Time of the CityPersons evaluation, compared with a literal implementation, and memory for ten million detections.

    python benchmarks/studies/scoring_speed.py citypersons/val_gt.json

Both implementations evaluate the same rows in the same run; reading the files is not counted. The literal
implementation is the reference of the tests (tests/hkd_det/metrics/official_citypersons.py). It loops over lists as
the official Python program does.
"""

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.metrics import citypersons
from hkd_det.metrics.coco_files import CocoGroundTruth, read_coco_detections, read_coco_ground_truth
from hkd_det.metrics.tables import DetectionTable

REFERENCE = Path(__file__).parents[2] / "tests" / "hkd_det" / "metrics" / "official_citypersons.py"
ROUNDS = 5
Rows = list[dict[str, Any]]


def main() -> None:
    """Print the times, the largest difference and the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="CityPersons' val_gt.json")
    parser.add_argument(
        "--detections", type=int, default=20_000, help="detections to compare on (default: %(default)s)"
    )
    parser.add_argument(
        "--many", type=int, default=10_000_000, help="detections of the memory test; 0 skips it (default: %(default)s)"
    )
    flags = parser.parse_args()
    ground_truth = read_coco_ground_truth(flags.annotations)
    rows = generate_detections(flags.annotations, flags.detections)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dt.json"
        path.write_text(json.dumps(rows))
        detections = read_coco_detections(path, ground_truth)
    compare_implementations(ground_truth, detections, group_by_image(flags.annotations, rows))
    if flags.many:
        evaluate_many(ground_truth, flags.many)


def generate_detections(annotations: Path, count: int) -> Rows:
    """Return detections: persons with about 6 % noise in position and size, and random false positives.

    Args:
        annotations: Annotation file in COCO layout.
        count: Number of detections.
    """
    rng = np.random.default_rng(0)
    rows: Rows = []
    for record in json.loads(annotations.read_text())["annotations"]:
        x, y, width, height = record["bbox"]
        dx, dy, dw, dh = rng.normal(0, 0.06, 4) * [width, height, width, height]
        box = [x + dx, y + dy, max(1.0, width + dw), max(1.0, height + dh)]
        rows.append({"image_id": record["image_id"], "category_id": 1, "bbox": box, "score": float(rng.beta(3, 1))})
    while len(rows) < count:
        height = float(rng.uniform(20, 300))
        box = [float(rng.uniform(0, 1900)), float(rng.uniform(200, 700)), 0.41 * height, height]
        image = int(rng.integers(1, 501))
        rows.append({"image_id": image, "category_id": 1, "bbox": box, "score": float(rng.beta(1, 3))})
    return rows[:count]


def group_by_image(annotations: Path, rows: Rows) -> list[tuple[Rows, list[tuple[list[float], float]]]]:
    """Return (annotations, detections) per image, as the reference expects them.

    Args:
        annotations: Annotation file in COCO layout.
        rows: Detections in COCO layout.
    """
    content = json.loads(annotations.read_text())
    images: dict[int, tuple[Rows, list[tuple[list[float], float]]]] = {
        image_id: ([], []) for image_id in sorted(image["id"] for image in content["images"])
    }
    for record in content["annotations"]:
        images[record["image_id"]][0].append(record)
    for row in rows:
        images[row["image_id"]][1].append((row["bbox"], row["score"]))
    return list(images.values())


def compare_implementations(
    ground_truth: CocoGroundTruth,
    detections: DetectionTable,
    images: list[tuple[Rows, list[tuple[list[float], float]]]],
) -> None:
    """Run both implementations alternately and print the fastest time of each.

    Args:
        ground_truth: The ground truth.
        detections: The detections.
        images: Both in the form of `group_by_image`.
    """
    spec = importlib.util.spec_from_file_location("official_citypersons", REFERENCE)
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    project_s, reference_s, max_difference = [], [], 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        rates = citypersons.evaluate(ground_truth.table, detections)
        project_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        expected = {
            name: reference.miss_rate(images, setup.height_px, setup.visible_ratio)
            for name, setup in citypersons.SETUPS.items()
        }
        reference_s.append(time.perf_counter() - start)
        max_difference = max(abs(rates[name].value - value) for name, value in expected.items())
    print(f"{len(detections):,} detections, {len(citypersons.SETUPS)} setups, fastest of {ROUNDS} rounds each:")
    factor = min(reference_s) / min(project_s)
    print(f"  hkd-det {min(project_s):.3f} s, reference {min(reference_s):.3f} s: {factor:.0f} times as fast")
    print(f"  largest difference of a miss rate {max_difference:.1e}")


def evaluate_many(ground_truth: CocoGroundTruth, count: int) -> None:
    """Read and evaluate random detections of a JSON file, and print times and the peak memory of the process.

    Args:
        ground_truth: The ground truth.
        count: Number of detections.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.json"
        write_many(path, count)
        start = time.perf_counter()
        detections = read_coco_detections(path, ground_truth)
        read_s = time.perf_counter() - start
        start = time.perf_counter()
        citypersons.evaluate(ground_truth.table, detections)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
    print(
        f"{len(detections):,} detections: read in {read_s:.0f} s, all setups in {time.perf_counter() - start:.0f} s, ",
        end="",
    )
    print(f"peak memory {peak_gib:.1f} GiB")


def write_many(path: Path, count: int) -> None:
    """Write random detections, one per line.

    Args:
        path: The JSON file.
        count: Number of detections.
    """
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        file.write("[")
        for start in range(0, count, 100_000):
            size = min(100_000, count - start)
            image, x, y = rng.integers(1, 501, size), rng.uniform(0, 1900, size), rng.uniform(200, 700, size)
            height, score = rng.uniform(20, 300, size), rng.random(size)
            file.write(",\n" if start else "\n")
            file.write(
                ",\n".join(
                    f'{{"image_id":{i},"bbox":[{a:.2f},{b:.2f},{0.41 * h:.2f},{h:.2f}],"score":{s:.6f}}}'
                    for i, a, b, h, s in zip(image, x, y, height, score, strict=True)
                )
            )
        file.write("]")


if __name__ == "__main__":
    main()
