"""The recipes are what hkd-train reads: each gives a run's settings, and the command that its head shows is whole."""

from pathlib import Path

import pytest
import yaml

from hkd_det.distill.methods import DistillConfig
from hkd_det.train.config import TrainConfig

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def test_there_is_one_for_every_method() -> None:
    used = {name for path in RECIPES for name in yaml.safe_load(path.read_text(encoding="utf-8"))["distill"]}
    assert used == set(DistillConfig.__dataclass_fields__)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_runs_settings(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rest = {
        "data": "street.yaml",
        "save_dir": "runs/x",
        "teacher": "best.pt",
        "model": content.get("model", "teacher-r50"),
    }
    config = TrainConfig.from_dict({**rest, **content}, str(path))
    assert config.distill.names == [name for name in DistillConfig.__dataclass_fields__ if name in content["distill"]]
    assert f"--recipe recipes/{path.name}" in path.read_text(encoding="utf-8")
