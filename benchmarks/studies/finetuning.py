"""Fine-tuning of the shipped detector on small data sets: gain on the new data, and loss on other data.

    python benchmarks/studies/finetuning.py --annotations FILE.json --images DIR --test A.yaml,B.yaml \
        [--counts 100,300,500] [--starts hkd-cpu,scratch,yolo11n] [--epochs 20] [--set KEY=VALUE]

FILE.json is a COCO file of a data set that did not train the shipped detector. 100 of its images choose the epoch; from
the others, subsets of growing size train. Starts: a shipped detector with the default settings of hkd-train; `scratch`,
the same architecture from random weights; a model of Ultralytics from random weights. All starts see the same images at
the same input size for the same number of epochs. The miss rates are those of the val split of each test file, with the
paired difference to the shipped detector.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from hkd_det.datasets.catalog import load_dataset
from hkd_det.files import read_json, write_text
from hkd_det.metrics.bootstrap import compare_miss_rates
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.models.zoo import load_detector
from hkd_det.shipped import DEFAULT_MODEL, SHIPPED_MODELS, resolve_model
from hkd_det.train.engine import predict_dataset

NUM_VAL_IMAGES = 100
SCRATCH = "scratch"


@dataclass(frozen=True)
class FinetuningResult:
    """Miss rates after training one start on one number of images.

    Attributes:
        start: Initial weights.
        num_images: Training images.
        results: Miss rate on each test file.
    """

    start: str
    num_images: int
    results: list[MissRateResult]


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all starts, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO file of the new data set")
    parser.add_argument("--images", type=Path, required=True, help="its image directory")
    parser.add_argument("--test", required=True, help="data YAML files whose val split is measured, comma-separated")
    parser.add_argument("--counts", default="100,300,500", help="training images (default: %(default)s)")
    parser.add_argument("--starts", default=f"{DEFAULT_MODEL},{SCRATCH},yolo11n", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the shipped start")
    parser.add_argument("--work", type=Path, default=Path("runs/finetuning"), help="directory of the runs")
    parser.add_argument("--results", type=Path, help="Markdown file to write; a plot is written next to it")
    arguments = parser.parse_args(argv)
    tests = arguments.test.split(",")
    counts = [int(count) for count in arguments.counts.split(",")]
    data_files = write_subsets(arguments.annotations, arguments.images, counts, arguments.work)
    measured = [FinetuningResult(DEFAULT_MODEL, 0, measure(resolve_model(None), tests))]
    for start in arguments.starts.split(","):
        for count, data in zip(counts, data_files, strict=True):
            weights = train(start, data, arguments.epochs, arguments.work / f"{start}-{count}", arguments.set)
            measured.append(FinetuningResult(start, count, measure(weights, tests)))
            print(format_row(measured[-1], measured[0]), flush=True)
    page = format_page(measured, [Path(test).stem for test in tests])
    print(page)
    if arguments.results:
        write_text(arguments.results, page)
        plot(measured, [Path(test).stem for test in tests], arguments.results.with_suffix(".png"))


def write_subsets(annotations: Path, images: Path, counts: Sequence[int], work: Path) -> list[Path]:
    """Write a data YAML for each number of training images. Larger subsets contain the smaller ones.

    Args:
        annotations: COCO file.
        images: Its image directory.
        counts: Numbers of training images.
        work: Directory of the files.
    """
    content = read_json(annotations)
    order = list(content["images"])
    random.Random(0).shuffle(order)
    val, train = order[:NUM_VAL_IMAGES], order[NUM_VAL_IMAGES:]
    work.mkdir(parents=True, exist_ok=True)
    _write_subset(content, val, work / "val.json")
    data_files = []
    for count in counts:
        _write_subset(content, train[:count], work / f"train_{count}.json")
        splits = {"train": f"train_{count}.json", "val": "val.json"}
        source = {name: {"images": str(images.resolve()), "annotations": file} for name, file in splits.items()}
        data_files.append(work / f"data_{count}.yaml")
        write_text(data_files[-1], yaml.safe_dump({"format": "coco", **source}))
    return data_files


def _write_subset(content: dict[str, Any], images: list[dict[str, Any]], path: Path) -> None:
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    write_text(path, json.dumps({**content, "images": images, "annotations": annotations}))


def train(start: str, data: Path, epochs: int, run: Path, settings: Sequence[str]) -> Path:
    """Train one start and return its best.pt; a finished run is kept.

    Args:
        start: A shipped detector, "scratch", or a model of Ultralytics.
        data: Data YAML.
        epochs: Number of epochs.
        run: Directory of the run.
        settings: Values of --set for a shipped detector.
    """
    if (run / "done").exists():
        return run / "best.pt"
    command = [sys.executable, "-m", "hkd_det.train.cli", "--data", str(data), "--epochs", str(epochs)]
    command += ["--project", str(run.parent), "--name", run.name, "--exist-ok", "--set", "setup=All", "--workers", "0"]
    if start in SHIPPED_MODELS:
        command += [part for setting in settings for part in ("--set", setting)]
    else:
        command += ["--imgsz", "320x320", *(["--from-scratch"] if start == SCRATCH else ["--model", start])]
    subprocess.run(command, check=True)
    (run / "done").touch()
    return run / "best.pt"


def measure(weights: Path, tests: Sequence[str]) -> list[MissRateResult]:
    """Compute the miss rate on the val split of each test file.

    Args:
        weights: Detector to load.
        tests: Data YAML files.
    """
    detector = load_detector(weights).eval()
    results = []
    for test in tests:
        samples = load_dataset(test, "val")
        detections = predict_dataset(detector, samples, (320, 320), bf16=False)
        results.append(evaluate_detections(samples, detections, [SETUPS["All"]])["All"])
    return results


def format_row(measured: FinetuningResult, reference: FinetuningResult) -> str:
    """Return a row of the table: miss rates with the paired differences to the shipped detector."""
    cells = []
    for result, of_reference in zip(measured.results, reference.results, strict=True):
        difference = compare_miss_rates(result, of_reference)
        interval = ""
        if measured is not reference and difference is not None:
            low, high = 100 * difference.ci_low, 100 * difference.ci_high
            interval = f" ({100 * difference.value:+.1f}, {low:+.1f} to {high:+.1f}: {difference.conclusion})"
        cells.append(f"{100 * result.value:.1f}{interval}")
    return f"| {measured.start} | {measured.num_images} | {' | '.join(cells)} |"


def format_page(measured: Sequence[FinetuningResult], tests: Sequence[str]) -> str:
    """Return the results as a Markdown page."""
    lines = [
        "# Fine-tuning the shipped detector",
        "",
        f"```bash\n{' '.join(['python', *sys.argv])}\n```",
        "",
        "MR^-2 in percent, all heights. In parentheses: difference to the shipped detector without training, with the "
        "95 % interval of a paired bootstrap over the images. One seed.",
        "",
        f"| start | training images | {' | '.join(tests)} |",
        f"|{' --- |' * (len(tests) + 2)}",
        *(format_row(result, measured[0]) for result in measured),
    ]
    return "\n".join(lines) + "\n"


def plot(measured: Sequence[FinetuningResult], tests: Sequence[str], path: Path) -> None:
    """Plot the miss rates over the number of training images.

    Args:
        measured: Results; the first one is the shipped detector without training.
        tests: Names of the test sets.
        path: PNG file to write.
    """
    figure, axes = plt.subplots(1, len(tests), figsize=(4 * len(tests), 3.2), squeeze=False)
    for index, (axis, test) in enumerate(zip(axes[0], tests, strict=True)):
        axis.axhline(100 * measured[0].results[index].value, color="gray", label="not fine-tuned")
        for start in dict.fromkeys(result.start for result in measured[1:]):
            rows = [result for result in measured[1:] if result.start == start]
            values = [100 * row.results[index].value for row in rows]
            axis.plot([row.num_images for row in rows], values, marker="o", label=start)
        axis.set(title=test, xlabel="training images", ylabel="MR$^{-2}$, %")
        axis.set_ylim(bottom=0)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
