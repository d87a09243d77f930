"""`--batch auto`: the choice on simulated memory, and one measured step without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hkd_det.errors import UsageError
from hkd_det.train import start
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import DistributedContext, make_epoch_plan, make_run_context
from hkd_det.train.start import choose_batch, find_batch
from hkd_det.train.trainer import Trainer

MIB = 2**20


def make_measure(fixed_mib: int, per_image_mib: int, gpu_mib: int = 10**6) -> Callable[[int], int]:
    def measure(batch: int) -> int:
        used_mib = fixed_mib + batch * per_image_mib
        if used_mib > gpu_mib:
            raise torch.OutOfMemoryError("simulated")
        return used_mib * MIB

    return measure


@pytest.mark.parametrize(
    ("budget_mib", "gpu_mib", "batch"),
    [(1000, 10**6, 9), (199, 10**6, 1), (300, 10**6, 2), (1000, 950, 8), (10**5, 10**6, 256)],
)
def test_batch_fills_the_budget(budget_mib: int, gpu_mib: int, batch: int) -> None:
    """A step uses 100 MiB, and 100 MiB per image."""
    measure = make_measure(100, 100 if budget_mib != 199 else 90, gpu_mib)
    assert choose_batch(measure, budget_mib * MIB) == batch


def test_estimate_that_does_not_fit_is_not_used() -> None:
    """Memory that grows faster than linearly: the measured estimate exceeds the budget."""
    assert choose_batch(lambda batch: (batch if batch <= 8 else 3 * batch) * MIB, 15 * MIB) == 8


def test_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(UsageError, match="one image exceeds"):
        choose_batch(make_measure(10, 10, gpu_mib=5), 100 * MIB)


def make_config(data_yaml: Path, run: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {"imgsz_hw": (64, 96), "device": "cpu", "workers": 0, **changes}
    return TrainConfig(str(data_yaml), "mini-student", str(run), **values)  # type: ignore[arg-type]


def test_cpu_is_refused(data_yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch auto: measures the memory of a GPU, and the device is cpu"):
        find_batch(make_config(data_yaml, tmp_path))


def test_measured_step_trains_on_the_largest_size(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hkd_det.datasets.catalog import load_dataset

    config = make_config(data_yaml, tmp_path)
    samples = load_dataset(str(data_yaml), "train")
    plan, context = make_epoch_plan(config, len(samples), 0), DistributedContext(0, 1, torch.device("cpu"))
    trainer = Trainer(
        config, plan, make_run_context(config, plan, context, samples, samples, False), context, samples, samples
    )
    shapes = []
    trainer.distiller.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    for name, value in {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_reserved": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    before = next(trainer.distiller.student.parameters()).detach().clone()
    assert start._measure_step(trainer, 3) == 7
    assert shapes == [(3, 3, 96, 128)]  # 1.25 times the size, rounded up to multiples of 32
    assert not torch.equal(before, next(trainer.distiller.student.parameters()))
