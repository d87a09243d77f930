"""Dataset of the training tests: dark boxes on a light background, in COCO format."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml


def write_dataset(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` images of 96x64 with one or two dark upright boxes each, and their COCO file."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        image = rng.integers(150, 255, (64, 96, 3)).astype(np.uint8)
        for _ in range(int(rng.integers(1, 3))):
            height = int(rng.integers(50, 60))
            x, y, width = int(rng.integers(0, 70)), int(rng.integers(0, 64 - height)), int(height * 0.41)
            image[y : y + height, x : x + width] = rng.integers(0, 60, 3)
            box = [x, y, min(width, 96 - x), height]
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "category_id": 1, "bbox": box})
        name = f"{index:03}.png"
        cv2.imwrite(str(root / split / name), image)
        images.append({"id": index + 1, "file_name": name, "width": 96, "height": 64})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (root / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def data_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data YAML file with 12 training and 4 validation images."""
    root = tmp_path_factory.mktemp("dataset")
    write_dataset(root, "train", 12, seed=1)
    write_dataset(root, "val", 4, seed=2)
    splits = {split: {"images": split, "annotations": f"{split}.json"} for split in ("train", "val")}
    path = root / "dataset.yaml"
    path.write_text(yaml.safe_dump({"format": "coco", "path": ".", **splits}))
    return path
