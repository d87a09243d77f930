"""docs/reference/onnx-model-config.md and recipes/onnx."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from hkd_det.onnxrt.model_config import OnnxModelConfig, OutputFormat, read_model_config

ROOT = Path(__file__).parents[3]
REFERENCE = (ROOT / "docs" / "reference" / "onnx-model-config.md").read_text(encoding="utf-8")


def test_example_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL)
    (tmp_path / "model.yaml").write_text(example)
    assert read_model_config(tmp_path / "model.yaml").color_order == "bgr"


def test_every_key_and_output_format_is_documented() -> None:
    names = {field.name for field in fields(OnnxModelConfig)} | set(get_args(OutputFormat))
    assert not {name for name in names if f"`{name}`" not in REFERENCE}


CONFIGS = [path for path in sorted((ROOT / "recipes" / "onnx").glob("*.yaml")) if path.stem != "ensemble"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    assert read_model_config(path).output_format
