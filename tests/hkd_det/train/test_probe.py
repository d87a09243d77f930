"""Choice of sigma by short runs: the split, the choice, resume, and which images are read in which part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hkd_det.config import dataclass_from_dict
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.noisy_teacher import SIGMAS, NoisyTeacher, NoisyTeacherConfig
from hkd_det.errors import DataError, UsageError
from hkd_det.models import zoo
from hkd_det.models.checkpoint import DetectorCheckpoint, load_training_state, save_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.train import engine, image_cache, probe
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import DistributedContext
from hkd_det.train.trainer import Trainer, train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
AUTO = {"noisy_teacher": {"sigma": "auto", "weight": 1.0}}
ONE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture
def make_config(data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """Return a function that builds the configuration of a run named `name`."""
    monkeypatch.setitem(zoo.MODELS, "mini-student", TINY)
    torch.manual_seed(3)
    teacher = tmp_path / "teacher.pt"
    save_detector_checkpoint(teacher, DetectorCheckpoint("tiny", TINY, HKDDetector(TINY).state_dict(), {}, 1, 1.0))

    def make(name: str, distill: dict[str, Any] = AUTO, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": str(data_yaml), "model": "mini-student", "save_dir": str(tmp_path / name), "imgsz_hw": (64, 96),
            "epochs": 2, "batch": 4, "workers": 0, "device": "cpu", "teacher": str(teacher), "distill": distill,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


def equal_states(a: Path, b: Path) -> bool:
    first, second = (load_training_state(path / "last.pt") for path in (a, b))
    return all(
        first[part].keys() == second[part].keys()
        and all(torch.equal(value, second[part][key]) for key, value in first[part].items())
        for part in ("distiller", "ema")
    )


def test_split_holds_out_a_tenth_that_follows_the_seed() -> None:
    samples: list[Any] = [f"{index}.png" for index in range(40)]
    train_part, held_out = probe.split_held_out(samples, 5)
    assert len(held_out) == 4 and sorted([*train_part, *held_out]) == sorted(samples)
    assert probe.split_held_out(samples, 5) == (train_part, held_out)
    assert probe.split_held_out(samples, 6)[1] != held_out
    assert [len(part) for part in probe.split_held_out(samples[:3], 0)] == [2, 1]


@pytest.mark.parametrize(
    ("miss_rates", "sigma"), [((0.5, 0.4, 0.6), 0.5), ((0.5, 0.5, 0.5), 0.2), ((0.9, 0.8, 0.1), 1)]
)
def test_lowest_miss_rate_is_chosen_and_printed(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    miss_rates: tuple[float, ...],
    sigma: float,
) -> None:
    config = make_config("run", epochs=40, patience=3)
    tried: list[TrainConfig] = []

    def measure(_trainer: Any, _context: Any, _unlabeled: Any, trial: TrainConfig, *_parts: Any) -> float:
        tried.append(trial)
        return miss_rates[len(tried) - 1]

    monkeypatch.setattr(probe, "_measure", measure)
    samples = load_dataset(config.data, "train")
    chosen = probe.choose_method_configs(config, Trainer, ONE_PROCESS, samples, [], resume=False)
    assert chosen == replace(config, distill={"noisy_teacher": NoisyTeacherConfig(sigma=sigma, weight=1.0)})
    assert [trial.distill["noisy_teacher"].sigma for trial in tried] == list(SIGMAS)
    # Short runs: 5 % of the epochs.
    assert all((trial.epochs, trial.seed, trial.lr) == (2, config.seed, config.lr) for trial in tried)
    output = capsys.readouterr()
    printed = output.out + output.err
    assert "1 held-out training images" in printed and f"chosen: sigma={sigma}" in printed
    assert all(f"{100 * miss_rate:.2f} %" in printed for miss_rate in miss_rates)
    assert ("do not distinguish the values" in printed) == (len(set(miss_rates)) == 1)


def test_complete_configuration_needs_no_run(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_measure", None)
    config = make_config("run", {"noisy_teacher": {"sigma": 0.5}})
    assert probe.choose_method_configs(config, Trainer, ONE_PROCESS, [], [], resume=False) == config


@pytest.mark.slow
def test_choice_uses_training_images_only_and_resumes(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reads are recorded at the decoder, so that mosaic tiles count as well."""
    config = make_config("auto", mosaic=1.0)
    train_paths, val_paths = ({s.path for s in load_dataset(config.data, split)} for split in ("train", "val"))
    trained: list[Path] = []
    evaluated: list[Path] = []
    record_reads(monkeypatch, image_cache, "read_image_bytes", trained)
    record_reads(monkeypatch, engine, "read_image", evaluated)
    results: list[tuple[set[Path], set[Path], float]] = []
    measure = probe._measure

    def record(*args: Any) -> float:
        trained.clear()
        evaluated.clear()
        miss_rate = measure(*args)
        results.append((set(trained), set(evaluated), miss_rate))
        return miss_rate

    weights: list[torch.Tensor] = []

    def record_weights(model: torch.nn.Module, *args: Any) -> Any:
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        return engine.evaluate(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "_measure", record)
    monkeypatch.setattr(probe, "evaluate", record_weights)
    train(config)
    _, held_out = probe.split_held_out(load_dataset(config.data, "train"), config.seed)
    assert len(results) == len(SIGMAS)
    for read, tested, _ in results:
        assert read and read <= train_paths - {s.path for s in held_out}
        assert tested == {s.path for s in held_out} and not tested & val_paths
    rates = [rate for *_, rate in results]
    sigma = SIGMAS[rates.index(min(rates))]

    saved = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert saved["distill"]["noisy_teacher"]["sigma"] == sigma
    assert load_training_state(tmp_path / "auto" / "last.pt")["config"]["distill"]["noisy_teacher"]["sigma"] == sigma
    # The short runs leave no trace: the run equals one with this sigma.
    fixed = {"noisy_teacher": {"sigma": sigma, "weight": 1.0}}
    train(make_config("fixed", fixed, mosaic=1.0))
    assert equal_states(tmp_path / "auto", tmp_path / "fixed")
    # The same seed gives the same weights, and another sigma gives others.
    train(make_config("again", mosaic=1.0))
    assert [rate for *_, rate in results] == [*rates, *rates] and len(weights) == 6
    assert all(torch.equal(first, second) for first, second in zip(weights[:3], weights[3:], strict=True))
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])

    monkeypatch.setattr(probe, "_measure", None)  # a resumed run has no short runs
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_epoch", interrupt_second_epoch(Trainer._run_epoch))
        with pytest.raises(KeyboardInterrupt):
            train(make_config("cut", fixed, mosaic=1.0))
    train(make_config("cut", mosaic=1.0), resume=True)  # from Python, with "auto"
    assert equal_states(tmp_path / "cut", tmp_path / "fixed")
    assert main(["--resume", str(tmp_path / "auto")]) == 0


def record_reads(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, paths: list[Path]) -> None:
    original = getattr(module, function)

    def read(path: Path, *args: Any, **kwargs: Any) -> Any:
        paths.append(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(module, function, read)


def interrupt_second_epoch(run_epoch: Callable[..., Any]) -> Callable[..., Any]:
    def run(trainer: Trainer, module: Any, epoch: int, progress: Any) -> Any:
        if epoch == 1:
            raise KeyboardInterrupt
        return run_epoch(trainer, module, epoch, progress)

    return run


def test_impossible_choices_are_refused(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("run")
    samples = load_dataset(config.data, "train")

    def choose(changed: TrainConfig, context: DistributedContext, images: list[Sample]) -> None:
        probe.choose_method_configs(changed, Trainer, context, images, [], resume=False)

    with pytest.raises(UsageError, match=r"^distill\.noisy_teacher: a choice requires one process"):
        choose(config, DistributedContext(0, 2, torch.device("cpu")), samples)
    with pytest.raises(UsageError, match="but blockwise makes it later"):
        choose(make_config("other", {**AUTO, "blockwise": {}}), ONE_PROCESS, samples)
    with pytest.raises(UsageError, match=r"^distill\.noisy_teacher\.sigma=auto: requires a run of hkd-train"):
        NoisyTeacher(NoisyTeacherConfig(sigma="auto"), HKDDetector(TINY), HKDDetector(TINY))
    with pytest.raises(DataError, match=r"no person of setup Reasonable to choose between sigma=0\.2 and"):
        choose(config, ONE_PROCESS, [])


def test_sigma_is_a_number_or_auto() -> None:
    assert dataclass_from_dict(NoisyTeacherConfig, {"sigma": "auto"}).sigma == "auto"
    assert dataclass_from_dict(NoisyTeacherConfig, {"sigma": "0.5"}).sigma == 0.5
    with pytest.raises(UsageError, match=r"^x\.sigma: expected a number or auto, got 'automatic'\.$"):
        dataclass_from_dict(NoisyTeacherConfig, {"sigma": "automatic"}, "x")
    with pytest.raises(UsageError, match=r"distill\.noisy_teacher\.sigma: expected at least 0"):
        NoisyTeacherConfig(sigma=-1.0)
