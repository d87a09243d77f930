"""`open_data`: from a name in datasets.yaml, or the user's own yaml, to samples."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.sample import Sample
from hkd_det.errors import DataError, UsageError


def open_data(data: str, split: str) -> list[Sample]:
    """The samples of a split (train, val or test) of a data set, never empty."""
    path = Path(data)
    content = yaml.safe_load(path.read_text())
    root = path.parent / content.get("path", ".")
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    samples: list[Sample] = []
    for entry in entries:
        samples += read_coco(root / entry["annotations"], root / entry["images"], content.get("category", ""))
    return samples
