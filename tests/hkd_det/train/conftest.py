"""A data set for training tests: dark boxes on a light background, in COCO format."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml


def write_people(root: Path, split: str, count: int, seed: int) -> None:
    """`count` pictures of 96 x 64 with one or two dark upright boxes each, and their COCO file."""
    chance = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        picture = chance.integers(150, 255, (64, 96, 3)).astype(np.uint8)
        for _ in range(int(chance.integers(1, 3))):
            height = int(chance.integers(50, 60))
            x, y, width = int(chance.integers(0, 70)), int(chance.integers(0, 64 - height)), int(height * 0.41)
            picture[y : y + height, x : x + width] = chance.integers(0, 60, 3)
            box = [x, y, min(width, 96 - x), height]
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "category_id": 1, "bbox": box})
        name = f"{index:03}.png"
        cv2.imwrite(str(root / split / name), picture)
        images.append({"id": index + 1, "file_name": name, "width": 96, "height": 64})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (root / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data yaml of 12 pictures to train on and 4 to validate."""
    root = tmp_path_factory.mktemp("people")
    write_people(root, "train", 12, seed=1)
    write_people(root, "val", 4, seed=2)
    splits = {split: {"images": split, "annotations": f"{split}.json"} for split in ("train", "val")}
    path = root / "people.yaml"
    path.write_text(yaml.safe_dump({"format": "coco", "path": ".", **splits}))
    return path
