"""Runs the Python examples of the documentation on metrics."""

import json
import re
from pathlib import Path

import pytest

from hkd_bench import scoring
from hkd_bench.cli import main

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.fixture
def one_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a ground-truth file of one person and a detection file that contains the same box."""
    box = [10, 10, 40, 100]
    content = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}]}
    (tmp_path / "val_gt.json").write_text(json.dumps(content))
    (tmp_path / "detections.json").write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": box, "score": 1}]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_example(page: str) -> None:
    example = re.search(r"```python\n(.*?)```", (HOW_TO / page).read_text(), re.DOTALL)
    assert example is not None
    exec(compile(example[1], page, "exec"), {})


@pytest.mark.usefixtures("one_person")
def test_score_example_prints_miss_rate(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("score.md")
    assert capsys.readouterr().out.split() == ["0.0", "1"]


@pytest.mark.usefixtures("one_person")
def test_add_a_metric_example_scores_recall(capsys: pytest.CaptureFixture[str]) -> None:
    protocols = dict(scoring.PROTOCOLS)
    try:
        run_example("add-a-metric.md")
        flags = ["--annotations", "val_gt.json", "--detections", "detections.json", "--protocol", "recall"]
        assert main(["score", *flags, "--json", "-"]) == 0
    finally:
        del scoring.PROTOCOLS["recall"]
    assert protocols == scoring.PROTOCOLS
    assert json.loads(capsys.readouterr().out)["metrics"] == {"recall": 1.0}
