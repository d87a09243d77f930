"""Test of the quickstart at a small size."""

import re
from functools import partial
from pathlib import Path

import pytest

from hkd_bench.bench import BenchOptions
from hkd_bench.quickstart import main, steps
from hkd_bench.quickstart.steps import QuickstartConfig, run_quickstart
from hkd_bench.result import read_result
from hkd_det.errors import DataError
from hkd_det.train.config import TrainConfig


@pytest.mark.slow
def test_quickstart_writes_report_video_and_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without loader processes, and with one process per measured model: each would import its packages again."""
    monkeypatch.setattr(steps, "TrainConfig", partial(TrainConfig, workers=0))
    monkeypatch.setattr(steps, "BenchOptions", partial(BenchOptions, rounds=1, warmup=1, warmup_s=0))
    config = QuickstartConfig(num_train=8, num_val=4, imgsz_hw=(64, 128), epochs=1, batch=4, runs=9, video_frames=4)
    result = run_quickstart(tmp_path, seed=1, config=config)
    teacher, baseline, distilled = result.models
    assert [model.name for model in result.models] == ["teacher", "student baseline", "student distilled"]
    assert baseline.parameters == distilled.parameters <= teacher.parameters / 6
    assert all(len(model.e2e_ms) == 9 and 0 <= model.miss_rates["Reasonable"] <= 1 for model in result.models)
    assert read_result(tmp_path / "bench.json") == result
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', page), "the page must be self-contained"
    for model in result.models:
        assert model.name in page and f"{100 * model.miss_rates['Reasonable']:.2f}" in page
    assert page.count("<img") + page.count("<svg") >= 6
    assert (tmp_path / "video.mp4").stat().st_size > 0
    assert {p.name for p in (tmp_path / "student-hkd").iterdir()} == {
        ".lock",
        "best.pt",
        "last.pt",
        "config.yaml",
        "results.csv",
        "results.png",
        "val_errors.jpg",
    }


def test_default_epochs_are_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[QuickstartConfig] = []

    def record(_save_dir: Path, _seed: int, config: QuickstartConfig) -> None:
        configs.append(config)
        raise DataError("stop")

    monkeypatch.setattr("hkd_bench.quickstart.steps.run_quickstart", record)
    assert main(["--save-dir", str(tmp_path)]) == 1
    assert configs == [QuickstartConfig()]
