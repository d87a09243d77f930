"""How long all of CityPersons' setups take with 20,000 detections, beside a literal program; what ten million need.

    python benchmarks/studies/scoring.py ../shared/data/citypersons/val_gt.json

Both judge the same rows in the same run, once the files are read. The literal program is the one of the tests
(tests/hkd_det/metrics/official_citypersons.py): loops over lists, as the official Python program has them.
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
from hkd_det.metrics.coco import CocoGroundTruth, read_coco_detections, read_coco_ground_truth
from hkd_det.metrics.tables import DetectionTable

LITERAL = Path(__file__).parents[2] / "tests" / "hkd_det" / "metrics" / "official_citypersons.py"
ROUNDS = 5
Rows = list[dict[str, Any]]


def main() -> None:
    """Print the ratio, the difference, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="CityPersons' val_gt.json")
    parser.add_argument("--detections", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=10_000_000, help="0 leaves the test of memory out")
    flags = parser.parse_args()
    truth = read_coco_ground_truth(flags.annotations)
    rows = made_up(flags.annotations, flags.detections)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dt.json"
        path.write_text(json.dumps(rows))
        found = read_coco_detections(path, truth)
    compare(truth, found, by_picture(flags.annotations, rows))
    if flags.many:
        judge_many(truth, flags.many)


def made_up(annotations: Path, count: int) -> Rows:
    """People moved and stretched by some 6 %, and false alarms up to `count`."""
    chance = np.random.default_rng(0)
    rows: Rows = []
    for record in json.loads(annotations.read_text())["annotations"]:
        x, y, width, height = record["bbox"]
        dx, dy, dw, dh = chance.normal(0, 0.06, 4) * [width, height, width, height]
        box = [x + dx, y + dy, max(1.0, width + dw), max(1.0, height + dh)]
        rows.append({"image_id": record["image_id"], "category_id": 1, "bbox": box, "score": float(chance.beta(3, 1))})
    while len(rows) < count:
        height = float(chance.uniform(20, 300))
        box = [float(chance.uniform(0, 1900)), float(chance.uniform(200, 700)), 0.41 * height, height]
        image = int(chance.integers(1, 501))
        rows.append({"image_id": image, "category_id": 1, "bbox": box, "score": float(chance.beta(1, 3))})
    return rows[:count]


def by_picture(annotations: Path, rows: Rows) -> list[tuple[Rows, list[tuple[list[float], float]]]]:
    """As the literal program takes them."""
    content = json.loads(annotations.read_text())
    pictures: dict[int, tuple[Rows, list[tuple[list[float], float]]]] = {
        image: ([], []) for image in sorted(image["id"] for image in content["images"])
    }
    for record in content["annotations"]:
        pictures[record["image_id"]][0].append(record)
    for row in rows:
        pictures[row["image_id"]][1].append((row["bbox"], row["score"]))
    return list(pictures.values())


def compare(
    truth: CocoGroundTruth, found: DetectionTable, pictures: list[tuple[Rows, list[tuple[list[float], float]]]]
) -> None:
    """Ours in turn with the literal program, the fastest of each counted."""
    spec = importlib.util.spec_from_file_location("official_citypersons", LITERAL)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    ours_s, literal_s, apart = [], [], 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        rates = citypersons.evaluate(truth.table, found)
        ours_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = {
            name: program.miss_rate(pictures, setup.height_px, setup.visible_ratio)
            for name, setup in citypersons.SETUPS.items()
        }
        literal_s.append(time.perf_counter() - start)
        apart = max(abs(rates[name].value - value) for name, value in theirs.items())
    print(f"{len(found):,} detections, {len(citypersons.SETUPS)} setups, best of {ROUNDS} rounds in turn:")
    print(f"  ours {min(ours_s):.3f} s, literal {min(literal_s):.3f} s: 1/{min(literal_s) / min(ours_s):.0f}")
    print(f"  largest difference of a miss rate {apart:.1e}")


def judge_many(truth: CocoGroundTruth, count: int) -> None:
    """From a JSON file to the figures; the most memory the process ever held is printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.json"
        write_many(path, count)
        start = time.perf_counter()
        found = read_coco_detections(path, truth)
        read_s = time.perf_counter() - start
        start = time.perf_counter()
        citypersons.evaluate(truth.table, found)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
    print(
        f"{len(found):,} detections: read in {read_s:.0f} s, all setups in {time.perf_counter() - start:.0f} s, ",
        end="",
    )
    print(f"at most {peak_gib:.1f} GiB in memory")


def write_many(path: Path, count: int) -> None:
    """Detections at random places, in lines."""
    chance = np.random.default_rng(1)
    with path.open("w") as file:
        file.write("[")
        for start in range(0, count, 100_000):
            size = min(100_000, count - start)
            image, x, y = chance.integers(1, 501, size), chance.uniform(0, 1900, size), chance.uniform(200, 700, size)
            height, score = chance.uniform(20, 300, size), chance.random(size)
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
