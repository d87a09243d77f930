"""Recipes are valid settings of hkd-train, and each states its own command."""

from pathlib import Path

import pytest
import yaml

from hkd_det.distill import METHODS
from hkd_det.train.config import TrainConfig

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def test_recipes_cover_the_published_methods() -> None:
    used = {name for path in RECIPES for name in yaml.safe_load(path.read_text(encoding="utf-8"))["distill"]}
    assert {"hkd", "noisy_teacher", "mokd", "cdd", "blockwise", "soft_labels"} <= used <= set(METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_valid_configuration(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rest = {"data": "street.yaml", "save_dir": "runs/x", "teacher": "best.pt", "model": "teacher-r50"}
    config = TrainConfig.from_dict({**rest, **content}, str(path))
    assert list(config.distill) == [name for name in METHODS if name in content["distill"]]
    assert f"--recipe recipes/{path.name}" in path.read_text(encoding="utf-8")
