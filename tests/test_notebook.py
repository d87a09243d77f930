"""The notebook of examples/ runs from top to bottom. The tests need no Jupyter: they run the code of its cells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hkd_det.datasets.synthetic import generate_scene
from hkd_det.structures import Detections, box_iou, xyxy_from_xywh

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Runs the cells as a kernel does: in one namespace named `__main__` without a file.
RUN_CELLS = """
import json, sys

namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.load(sys.stdin)):
    exec(compile(cell, f"cell {number}", "exec"), namespace)
detections = namespace["detections"]
print(json.dumps({"detections": detections.to_dict(), "results": [len(found) for found in namespace["results"]],
                  "from_opencv": namespace["from_opencv"].to_dict()}))
"""


def read_code_cells(path: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_examples_have_a_notebook() -> None:
    assert NOTEBOOKS
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if path.name not in readme] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_notebook_runs_and_detects_the_rendered_people(tmp_path: Path) -> None:
    cells = read_code_cells(ROOT / "examples" / "detect_people.ipynb")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_CELLS],
        input=json.dumps(cells), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # quiet: no progress bar and no warning
    assert list(tmp_path.iterdir()) == []
    printed = json.loads(done.stdout.splitlines()[-1])
    detections = Detections(**printed["detections"])
    assert printed["results"][1] == len(detections) >= 4
    assert printed["from_opencv"] == printed["detections"]
    records = generate_scene(seed=0, split=0, index=1).records
    iou = box_iou(detections.boxes_xyxy, xyxy_from_xywh([record.box_xywh for record in records]))
    assert (iou.max(axis=1) > 0.5).mean() >= 0.75
