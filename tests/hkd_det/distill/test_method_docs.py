"""The tables of docs/how-to/distill.md and docs/reference/recipe.md list the methods and keys that exist."""

import dataclasses
import re
from pathlib import Path

from hkd_det.distill import METHODS, load_method
from hkd_det.train.config import TrainConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_method_table_lists_all_methods() -> None:
    page = (DOCS / "how-to" / "distill.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE) == list(METHODS)


def test_recipe_reference_lists_all_keys() -> None:
    page = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for title, cls in {"Run": TrainConfig, **{name: load_method(name).Config for name in METHODS}}.items():
        listed = re.findall(r"`\.?(\w+)", "\n".join(re.findall(r"^\| (`[^|]*)", sections[title], re.MULTILINE)))
        assert {field.name for field in dataclasses.fields(cls)} <= set(listed), title
