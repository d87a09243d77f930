"""The examples of docs/reference/dataset-yaml.md and docs/how-to/add-a-reader.md."""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from hkd_det.datasets import catalog
from hkd_det.datasets.catalog import list_splits, load_dataset
from hkd_det.datasets.data_yaml import CATALOG_KEYS, COMMON_KEYS
from hkd_det.errors import DataError

DOCS = Path(__file__).parents[3] / "docs"
REFERENCE = (DOCS / "reference" / "dataset-yaml.md").read_text(encoding="utf-8")
GUIDE = (DOCS / "how-to" / "add-a-reader.md").read_text(encoding="utf-8")


def find_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("text", find_blocks(REFERENCE, "yaml"))
def test_yaml_example_has_only_known_keys(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    assert "train" in list_splits(str(tmp_path / "my.yaml"))


def test_every_format_and_option_is_documented() -> None:
    formats = {yaml.safe_load(text).get("format", "yolo") for text in find_blocks(REFERENCE, "yaml")}
    assert formats == {"yolo", "coco", *catalog.READERS}
    options = {key for reader in catalog.READERS.values() for key in reader.options}
    for key in COMMON_KEYS | CATALOG_KEYS | options:
        assert f"`{key}`" in REFERENCE, key


def test_documented_reader_loads_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, row = find_blocks(GUIDE, "python")
    monkeypatch.setattr(catalog, "READERS", dict(catalog.READERS))
    namespace: dict[str, Any] = {"READERS": catalog.READERS, "DatasetReader": catalog.DatasetReader}
    exec(compile(reader + row, "add-a-reader.md", "exec"), namespace)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((60, 100, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "images" / "b.png"), np.zeros((60, 100, 3), np.uint8))
    rows = ["split,image,x1,y1,x2,y2", "train,a.png,1,2,3,4", "train,a.png,1,2,x,4", "train,b.png,1,2,x,4"]
    (tmp_path / "annotations.csv").write_text("\n".join(rows))
    (data,) = find_blocks(GUIDE, "yaml")
    (tmp_path / "data.yaml").write_text(data)
    with pytest.raises(DataError, match="line 3"):
        load_dataset(str(tmp_path / "data.yaml"), "train")
    errors: list[DataError] = []
    valid, empty = load_dataset(str(tmp_path / "data.yaml"), "train", errors.append)
    assert valid.ground_truth.boxes_xyxy.tolist() == [[1, 2, 3, 4]] and len(errors) == 2
    assert empty.ground_truth.boxes_xyxy.shape == (0, 4)
