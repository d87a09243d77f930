"""False alarms and detected changes of `hkd-demo --monitor`, from the validation images of a model.

    python benchmarks/studies/drift.py MODEL --data DATA.yaml [--write]

False alarms: reference and window are bootstrap samples of the same images, so each alarm is false. In a correlated
window, each image is repeated, as by people who wait in front of a camera. Changes: all images are changed in one way.
`--write` stores the reference in the metadata of an ONNX file that was exported without one.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.drift import (
    MIN_COUNT,
    QUANTITIES,
    DriftReference,
    build_reference,
    compute_psi,
    count_values,
    merge_bins,
)
from hkd_deploy.model_metadata import REFERENCE_KEY
from hkd_deploy.pipeline import open_detector
from hkd_det.datasets.catalog import load_dataset
from hkd_det.image import read_image
from hkd_det.shipped import resolve_model

NUM_REFERENCES, NUM_WINDOWS = 20, 1000
WINDOWS = ((100, 1), (300, 1), (1000, 1), (3600, 1), (3600, 10), (3600, 60))  # frames, and repetitions of an image
Image = NDArray[np.uint8]
Counts = dict[str, NDArray[np.int64]]

CHANGES: dict[str, Callable[[Image], Any]] = {
    "none": lambda image: image,
    "a third of the light": lambda image: image // 3,
    "blur, 5 px": lambda image: cv2.GaussianBlur(image, (0, 0), 5),
    "noise, standard deviation 30": lambda image: np.clip(
        image + np.random.default_rng(0).normal(0, 30, image.shape), 0, 255
    ),
    "people at half size": lambda image: cv2.copyMakeBorder(
        cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        0,
        image.shape[0] - image.shape[0] // 2,
        0,
        image.shape[1] - image.shape[1] // 2,
        cv2.BORDER_REFLECT_101,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model file, or name of a shipped model")
    parser.add_argument("--data", required=True, help="data YAML, whose val split is used")
    parser.add_argument("--write", action="store_true", help="store the reference in the ONNX file")
    flags = parser.parse_args(argv)
    path = resolve_model(flags.model)
    images = [read_image(sample.path) for sample in load_dataset(flags.data, "val")]
    with open_detector(path, threads=1) as detector:
        conf = detector.default_conf
        counts = {
            name: [
                count_values(detector(np.ascontiguousarray(change(image), np.uint8)), image.shape[0], conf)
                for image in images
            ]
            for name, change in CHANGES.items()
        }
    reference = build_reference(counts["none"], conf)
    assert reference is not None
    if flags.write:
        write_reference(path, reference)
    stacked = {name: stack_counts(of_change) for name, of_change in counts.items()}
    print(f"{len(images)} images, minimum score of a person {conf:g}")
    print_false_alarms(stacked["none"], counts["none"], conf)
    print_changes(stacked, reference)


def stack_counts(counts: Sequence[Counts]) -> Counts:
    """Return the counts of all images, int64[images, bins] by quantity.

    Args:
        counts: Counts of each image.
    """
    return {name: np.stack([one[name] for one in counts]) for name in QUANTITIES}


def find_alarms(reference: DriftReference, pool: Counts, rows: NDArray[np.int64], repeats: int) -> dict[str, bool]:
    """Return for each quantity whether a window is above the threshold.

    Args:
        reference: The reference.
        pool: Counts of all images.
        rows (int64[N]): Images of the window.
        repeats: How often each of them is repeated.
    """
    alarms = {}
    for name, one in reference.distributions.items():
        counts = repeats * merge_bins(name, one.edges, pool[name][rows].sum(0))
        num_values = int(counts.sum())
        is_above = float(compute_psi(counts, one.counts)) > one.compute_threshold(max(1, num_values))
        alarms[name] = num_values >= MIN_COUNT and is_above
    return alarms


def print_false_alarms(pool: Counts, counts: Sequence[Counts], conf: float) -> None:
    """Print the ratio of windows with an alarm.

    Args:
        pool: Counts of all images, stacked.
        counts: The same, per image.
        conf: Minimum score of a person.
    """
    rng, total = np.random.default_rng(0), len(counts)
    alarms: dict[tuple[int, int], list[list[bool]]] = {window: [] for window in WINDOWS}
    for _ in range(NUM_REFERENCES):
        reference = build_reference([counts[row] for row in rng.integers(0, total, total)], conf)
        assert reference is not None
        for num_frames, repeats in WINDOWS:
            for _ in range(NUM_WINDOWS):
                rows = rng.integers(0, total, num_frames // repeats)
                alarms[num_frames, repeats].append(list(find_alarms(reference, pool, rows, repeats).values()))
    print(f"\n{NUM_REFERENCES} references, {NUM_WINDOWS} windows each\n")
    print(
        f"| frames | repetitions | {' | '.join(QUANTITIES)} | any |\n| ---: | ---: |{' ---: |' * (len(QUANTITIES) + 1)}"
    )
    for (num_frames, repeats), rows_of_alarms in alarms.items():
        table = np.array(rows_of_alarms)
        rates = [*table.mean(0), table.any(1).mean()]
        print(f"| {num_frames} | {repeats} | {' | '.join(f'{rate:.2%}' for rate in rates)} |")


def print_changes(stacked: dict[str, Counts], reference: DriftReference) -> None:
    """Print the PSI of all changed images, and the ratio of windows of 300 images with an alarm.

    Args:
        stacked: Counts of all images by change.
        reference: Reference of the unchanged images.
    """
    rng = np.random.default_rng(0)
    print(f"\n| change | {' | '.join(f'PSI {name}' for name in QUANTITIES)} | windows with drift |")
    print(f"| --- |{' ---: |' * 4}")
    for change, pool in stacked.items():
        scores = [
            float(compute_psi(merge_bins(name, one.edges, pool[name].sum(0)), one.counts))
            for name, one in reference.distributions.items()
        ]
        num_images = len(pool["persons"])
        found = [
            any(find_alarms(reference, pool, rng.integers(0, num_images, 300), 1).values()) for _ in range(NUM_WINDOWS)
        ]
        print(f"| {change} | {' | '.join(f'{score:.2f}' for score in scores)} | {np.mean(found):.1%} |")


def write_reference(path: Path, reference: DriftReference) -> None:
    """Store a reference in an ONNX file.

    Args:
        path: The file.
        reference: The reference.
    """
    import onnx  # noqa: PLC0415 - only here

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {REFERENCE_KEY: reference.to_json()})
    onnx.save(model, path)


if __name__ == "__main__":
    main()
