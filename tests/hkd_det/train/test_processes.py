"""Two gloo processes against one: the same global batch, the same gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from hkd_det.distill.mokd import Arbitration
from hkd_det.distill.distiller import Distiller
from hkd_det.distill.hkd import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.distill.mokd import arbiter_of
from hkd_det.models.criterion import total
from hkd_det.models.criterion import TruthBatch
from hkd_det.models.detector import Detector, DetectorSpec, freeze_norms
from hkd_det.distill.distiller import Learner
from hkd_det.train.distributed import joined_processes

spec = DetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
with joined_processes("cpu") as processes:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = Detector(spec), Detector(spec)
    methods = Methods(hkd=Hierarchical(confident=0.009))
    learner = Learner(student, Distiller(student, teacher, methods), processes.norm_of)
    learner.train()
    freeze_norms(student)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 255, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[[5., 5., 30., 60.], [40., 10., 60., 60.]]] * 4)
    real = torch.tensor([[True, True], [True, False], [False, False], [True, False]])
    ignore = torch.tensor([[False, False], [False, True], [False, False], [False, False]])
    mine = slice(processes.rank, None, processes.count)
    rules = {
        "sum": None,
        "parameters": Arbitration("min-norm"),
        "feature": Arbitration("bisector", at="feature"),
        "amortised": Arbitration("amortised"),
    }
    for name, rule in rules.items():
        arbiter = arbiter_of(rule, learner, student, processes.average)
        wrapped = processes.count > 1 and rule is None
        module = DistributedDataParallel(learner) if wrapped else learner
        learner.zero_grad()
        task, taught = module(pictures[mine], TruthBatch(boxes[mine], real[mine], ignore[mine]), 1.0)
        told = arbiter.backward(total(task), total(taught), 1.0)
        if processes.leads:
            gradients = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
            torch.save({"gradients": gradients, "told": told}, f"{sys.argv[1]}-{name}")
"""

TWICE = """
import torch
from hkd_det.train.distributed import joined_processes

for _ in range(3):
    with joined_processes("cpu") as processes:
        ranks = [torch.tensor(float(processes.rank))]
        processes.average(ranks)
        assert ranks[0] == 0.5
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_two_processes_join_again_for_the_next_run(tmp_path: Path) -> None:
    """As for a control run after the taught one: what the first group left with torchrun must not be found."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """The plain sum's, and arbitrated ones by each way to weigh."""
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        command = [*launcher, str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for rule in ("sum", "parameters", "feature", "amortised"):
        one, two = (torch.load(tmp_path / f"{name}-{rule}", weights_only=True) for name in ("one", "two"))
        gradients, others = one["gradients"], two["gradients"]
        assert gradients.keys() == others.keys() and len(gradients) > 30
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-3, msg=f"{rule} {name}")
        assert any("adapters" in name for name in gradients)
        assert one["told"] == pytest.approx(two["told"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_torchrun_trains_like_one_process(people: Path, tmp_path: Path) -> None:
    """The command under torchrun, with frozen normalisation: the weights of a single process, up to rounding."""
    flags = ["--data", str(people), "--model", "mini-student", "--imgsz", "96x64", "--epochs", "1", "--batch", "4"]
    flags += ["--workers", "0", "--device", "cpu", "--set", "freeze_norm=true", "--set", "precision=fp32"]
    flags += ["--project", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        command = [*launcher, "-m", "hkd_det.train", *flags, "--name", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)["learner"] for name in ("one", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            # AdamW turns the rounding of a tiny gradient into a step of up to the rate (1e-3) times three steps.
            assert (value - two[name]).abs().mean() < 2e-4, name
