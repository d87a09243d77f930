"""Every yaml example of docs/data.md has only keys that the catalogue knows."""

import re
from pathlib import Path

import pytest
import yaml

from hkd_det.datasets.catalog import list_splits

DOC = Path(__file__).parents[3] / "docs" / "data.md"
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL) if "train:" in text]


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: yaml.safe_load(text).get("format", "yolo"))
def test_an_example_is_understood(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert "train" in list_splits(str(tmp_path / "mine.yaml"))


def test_all_formats_are_shown() -> None:
    shown = {yaml.safe_load(text).get("format", "yolo") for text in EXAMPLES}
    assert shown >= {"yolo", "coco", "citypersons", "caltech", "voc", "inria", "pennfudan", "crowdhuman", "eurocity"}
