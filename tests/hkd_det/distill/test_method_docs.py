"""The hand-written pages name only methods and keys that exist. docs/reference/methods.md is generated."""

import dataclasses
import re
from pathlib import Path

from hkd_det.distill import METHODS
from hkd_det.train.config import TrainConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_method_table_names_registered_methods() -> None:
    page = (DOCS / "how-to" / "distill.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE)
    assert len(rows) >= 6 and set(rows) <= set(METHODS)


def test_recipe_reference_lists_all_keys_of_a_run() -> None:
    page = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert set(listed) == {field.name for field in dataclasses.fields(TrainConfig)}
