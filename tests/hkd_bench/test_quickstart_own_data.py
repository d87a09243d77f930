"""Test of `hkd-quickstart --data` at a small size: killed after a stage and in a training, resumed, and finished."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hkd_bench.result import read_result
from hkd_deploy import open_detector
from hkd_det.datasets.synthetic import write_synthetic_dataset

# Few sizes, images and layers. SIGKILL after a stage or after the first epoch of a training ends the process like a
# power failure.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import hkd_det.models.yolox_weights as yolox_weights
from hkd_bench.quickstart import candidates, own_data, plan

yolox_weights.NUM_STATISTICS_IMAGES = 8
plan.STUDENT_SIZES.update({plan.NARROW: (64, 320), plan.WIDE: ()})
candidates.NUM_RUNS = candidates.NUM_PROBE_STEPS = 2
own_data.CALIB_IMAGES, own_data.MAX_MR_INCREASE = 4, 100.0
os.sched_getaffinity = lambda _: ()  # no loader processes
run, train = plan.PlanFile.run, own_data.train

def kill_after(name):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

def run_and_kill(self, stage, results):
    result = run(self, stage, results)
    kill_after(stage.name)
    return result

def train_and_kill(config, resume):
    return train(config, resume, on_epoch=lambda record: kill_after(f"{config.save_path.name}, epoch {record.epoch}"))

plan.PlanFile.run, own_data.train = run_and_kill, train_and_kill
options = plan.OwnDataOptions(sys.argv[1], Path(sys.argv[2]), epochs=2, max_ms=1e6, threads=1, runs=3)
own_data.run_own_data(options, is_plan_only=False)
"""
STAGES = ["check", "measure", "teacher", "control", "distilled", "sizes", "export", "bench", "report"]


def run_program(data: Path, save_dir: Path, kill_after: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(data), str(save_dir), kill_after]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_killed_quickstart_resumes_and_writes_the_folder(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "street", 6, 3, seed=1)
    data, save_dir = tmp_path / "mine.yaml", tmp_path / "run"
    content = {"format": "citypersons", "path": "street", "train": "train", "val": "val", "license": "CC BY 4.0"}
    data.write_text(yaml.safe_dump(content))

    killed = run_program(data, save_dir, "control")
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert list(json.loads((save_dir / "plan.json").read_text())["stages"]) == STAGES[:4]
    trained_ns = (save_dir / "control" / "best.pt").stat().st_mtime_ns
    killed = run_program(data, save_dir, "distilled, epoch 1")
    assert killed.returncode == -9, killed.stderr[-2000:]

    resumed = run_program(data, save_dir, "never")
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-2000:]
    assert resumed.stdout.count(": done") == 4
    assert "epoch 2/2" in resumed.stdout and "epoch 1/2" not in resumed.stdout
    assert (save_dir / "control" / "best.pt").stat().st_mtime_ns == trained_ns
    assert list(json.loads((save_dir / "plan.json").read_text())["stages"]) == STAGES

    deploy = save_dir / "deploy"
    assert {path.name for path in deploy.iterdir()} - {"model.int8.onnx"} == {
        "model.onnx", "MODEL_CARD.md", "README.md", "hkd-demo.service", "hkd-demo.env", "Containerfile",
    }  # fmt: skip
    card = (deploy / "MODEL_CARD.md").read_text()
    for text in (
        "CC BY 4.0",
        "6 training and 3 validation",
        "Suggested score threshold",
        "## Limits",
        "hkd-quickstart",
    ):
        assert text in card
    names = [model.name for model in read_result(save_dir / "bench.json").models]
    assert names == ["student alone", "before training", "student distilled"]
    page = (save_dir / "report.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', page), "the page must be self-contained"
    assert page.count("<svg") >= 4 and "Effect of the teacher" in page
    with open_detector(deploy / "model.onnx") as detector:
        assert detector.metadata.model == "yolox-nano-hswish"

    again = run_program(data, save_dir, "never")
    assert again.returncode == 0 and again.stdout.count(": done") == 9
