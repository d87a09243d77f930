"""The Python example of docs/evaluation.md, run as it stands."""

import json
import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[3] / "docs" / "evaluation.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    box = [10, 10, 40, 100]
    truth = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}]}
    (tmp_path / "val_gt.json").write_text(json.dumps(truth))
    (tmp_path / "mine.json").write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": box, "score": 1}]))
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    exec(compile(found[1], str(DOC), "exec"), {})
    assert capsys.readouterr().out.split() == ["0.0", "1"]
