"""Effect of one hour of frames of `hkd-demo --collect` on the miss rate of the shipped detector for that camera.

    python benchmarks/studies/collected_frames.py --annotations FILE.json --images DIR --val FILE.json \
        [--teacher FILE] [--test A.yaml,B.yaml] [--arms collected,random,ordinary] [--seed 0] [--work DIR]

1. An hour of a fixed camera is rendered, and a second sequence with other people and exact ground truth.
2. `hkd-demo hkd-cpu --collect` selects frames of the hour. The controls are as many random frames of the hour, and as
   many ordinary images of FILE.json.
3. `hkd-train` starts from hkd-cpu: a few labeled images of FILE.json, and the frames or the ordinary images without
   labels. The teacher is hkd-cpu at twice the image size, or the detector --teacher with `--distill soft_labels`.
4. The miss rates on the second sequence and on the val split of each test file are compared with hkd-cpu.

A finished stage is not repeated. Delete its files in `--work` to repeat it.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import yaml
from finetuning import measure
from street_camera import write_sequence

from hkd_deploy.demo.cli import main as hkd_demo
from hkd_det.files import read_json, write_text
from hkd_det.metrics.bootstrap import compare_miss_rates
from hkd_det.metrics.matching import MissRateResult
from hkd_det.shipped import DEFAULT_MODEL, resolve_model

HOUR_SEED, TEST_SEED = 1, 2
HOUR_FRAMES, HOUR_INTERVAL_S = 1800, 2.0  # the collection examines one frame in 2 s
TEST_FRAMES, TEST_INTERVAL_S = 480, 60.0  # far enough apart to be independent
NUM_LABELED, NUM_VAL = 240, 60
COLLECTED, RANDOM, ORDINARY = "collected", "random", "ordinary"
# Without --model, hkd-train starts from hkd-cpu with the settings of fine-tuning. The statistics of batch normalization
# are those of hkd-cpu, not of one camera. 60 steps of 4 labeled and 4 unlabeled images. One epoch: the val split, which
# has no images of the camera, selects none.
TRAIN_FLAGS = ("--epochs", "1", "--batch", "4", "--workers", "0")
SETTINGS = ("setup=All", "unlabeled_ratio=1", "freeze_bn=true")
# hkd-cpu is its own teacher: it also detects people in the images at twice the size.
SELF_SETTINGS = ("distill.dense.double_resolution=true", "distill.dense.flip_teacher=true")


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO file of labeled training images")
    parser.add_argument("--val", type=Path, required=True, help="COCO file of validation images of hkd-train")
    parser.add_argument("--images", type=Path, required=True, help="image directory of both")
    parser.add_argument("--teacher", default="", help="teacher of soft labels (default: hkd-cpu at twice the size)")
    parser.add_argument("--test", default="", help="data YAML files whose val split is measured, comma-separated")
    parser.add_argument("--arms", default=f"{COLLECTED},{RANDOM},{ORDINARY}", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/collected_frames"), help="directory of all files")
    flags = parser.parse_args(argv)
    work: Path = flags.work
    work.mkdir(parents=True, exist_ok=True)
    render(work)
    frames = collect(work)
    frames[ORDINARY] = choose_ordinary_images(flags, work, len(list(frames[RANDOM].iterdir())))
    data = write_data(flags, work)
    tests = [str(work / "street.yaml"), *filter(None, flags.test.split(","))]
    before = measure(resolve_model(None), tests)
    print(format_header(tests))
    print(format_row(DEFAULT_MODEL, before, before), flush=True)
    results = {}
    for arm in flags.arms.split(","):
        results[arm] = measure(train(arm, frames[arm], data, flags.teacher, work, flags.seed), tests)
        print(format_row(arm, results[arm], before), flush=True)
    print_comparisons(results)


def render(work: Path) -> None:
    """Render both sequences.

    Args:
        work: Directory of all files.
    """
    if not (work / "hour.json").exists():
        write_sequence(work / "hour.mp4", work / "hour.json", None, HOUR_FRAMES, HOUR_INTERVAL_S, HOUR_SEED)
    if not (work / "test.json").exists():
        images = work / "test"
        write_sequence(work / "test.mp4", work / "test.json", images, TEST_FRAMES, TEST_INTERVAL_S, TEST_SEED)
    source = {"images": "test", "annotations": "test.json"}
    write_text(work / "street.yaml", yaml.safe_dump({"format": "coco", "val": source}))


def collect(work: Path) -> dict[str, Path]:
    """Collect frames of the hour as a user does, and choose as many at random.

    Args:
        work: Directory of all files.

    Returns:
        Directory of the frames of each arm.
    """
    collected, chosen = work / COLLECTED, work / RANDOM
    if not collected.exists():
        temp = work / "collecting"
        shutil.rmtree(temp, ignore_errors=True)
        arguments = [DEFAULT_MODEL, "--source", str(work / "hour.mp4"), "--collect", str(temp), "--headless"]
        if hkd_demo(arguments):
            raise SystemExit(1)
        temp.rename(collected)
    if not chosen.exists():
        num_frames = len((collected / "frames.jsonl").read_text(encoding="utf-8").splitlines())
        numbers = set(random.Random(HOUR_SEED).sample(range(HOUR_FRAMES), num_frames))
        temp = work / "choosing"
        temp.mkdir(exist_ok=True)
        with av.open(str(work / "hour.mp4")) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    frame.to_image().save(temp / f"{number:05}.jpg", quality=95)
        temp.rename(chosen)
    return {COLLECTED: collected, RANDOM: chosen}


def choose_ordinary_images(flags: argparse.Namespace, work: Path, count: int) -> Path:
    """Copy images of the labeled dataset that are not used with labels, and return their directory.

    Args:
        flags: Arguments of the command.
        work: Directory of all files.
        count: Number of images.
    """
    chosen = work / ORDINARY
    images = read_json(flags.annotations)["images"]
    chosen.mkdir(exist_ok=True)
    for image in shuffle_images(images)[NUM_LABELED : NUM_LABELED + count]:
        path = flags.images / image["file_name"]
        shutil.copyfile(path, chosen / path.name)
    return chosen


def shuffle_images(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the images of a COCO file in a random order that is always the same.

    Args:
        images: Records of the file.
    """
    return random.Random(0).sample(images, len(images))


def write_data(flags: argparse.Namespace, work: Path) -> Path:
    """Write a data YAML of a few labeled images, and return it.

    Args:
        flags: Arguments of the command.
        work: Directory of all files.
    """
    splits: dict[str, Any] = {}
    for split, path, count in (("train", flags.annotations, NUM_LABELED), ("val", flags.val, NUM_VAL)):
        content = read_json(path)
        images = shuffle_images(content["images"])[:count]
        ids = {image["id"] for image in images}
        annotations = [one for one in content["annotations"] if one["image_id"] in ids]
        name = f"labeled_{split}.json"
        write_text(work / name, json.dumps({**content, "images": images, "annotations": annotations}))
        splits[split] = {"images": str(flags.images.resolve()), "annotations": name}
    write_text(work / "labeled.yaml", yaml.safe_dump({"format": "coco", **splits}))
    return work / "labeled.yaml"


def train(arm: str, frames: Path, data: Path, teacher: str, work: Path, seed: int) -> Path:
    """Train one arm and return its best.pt; a finished run is kept.

    Args:
        arm: Name of the arm.
        frames: Directory of the unlabeled images.
        data: Data YAML of the labeled images.
        teacher: Teacher of soft labels; empty for hkd-cpu.
        work: Directory of all files.
        seed: Seed of the training.
    """
    run = work / f"train-{arm}-{seed}"
    if not (run / "done").exists():
        settings = SETTINGS if teacher else SETTINGS + SELF_SETTINGS
        command = [sys.executable, "-m", "hkd_det.train.cli", "--data", str(data), "--unlabeled", str(frames)]
        command += ["--teacher", teacher, "--distill", "soft_labels"] if teacher else []
        command += [*TRAIN_FLAGS, *(part for setting in settings for part in ("--set", setting))]
        command += ["--seed", str(seed), "--project", str(work), "--name", run.name, "--exist-ok"]
        subprocess.run(command, check=True)
        (run / "done").touch()
    return run / "best.pt"


def format_header(tests: Sequence[str]) -> str:
    """Return the first two rows of the table."""
    return f"| frames | {' | '.join(Path(test).stem for test in tests)} |\n|{' --- |' * (len(tests) + 1)}"


def format_row(name: str, results: Sequence[MissRateResult], before: Sequence[MissRateResult]) -> str:
    """Return a row of the table: miss rates in percent with the paired differences to the shipped detector."""
    cells = []
    for result, reference in zip(results, before, strict=True):
        difference = compare_miss_rates(result, reference) if results is not before else None
        cells.append(f"{100 * result.value:.1f}" + (f" ({difference.summary()})" if difference else ""))
    return f"| {name} | {' | '.join(cells)} |"


def print_comparisons(results: Mapping[str, Sequence[MissRateResult]]) -> None:
    """Compare the collected frames with each control on the camera.

    Args:
        results: Miss rates of each arm; the first one is that of the camera.
    """
    for control in (RANDOM, ORDINARY):
        if COLLECTED in results and control in results:
            difference = compare_miss_rates(results[COLLECTED][0], results[control][0])
            print(f"{COLLECTED} compared with {control}: {difference.summary() if difference else '-'}")


if __name__ == "__main__":
    main()
