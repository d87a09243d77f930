"""Files of a run after each epoch: `best.pt`, `last.pt`, `results.csv`; and the exact continuation from `last.pt`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hkd_det.errors import DataError
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_training_state,
    save_detector_checkpoint,
    save_training_state,
)
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import EpochRecord, RunResults, find_best_record, write_history

if TYPE_CHECKING:
    from hkd_det.train.trainer import Trainer


def save_epoch(trainer: "Trainer", record: EpochRecord, detector: BaseDetector) -> bool:
    """Save the best checkpoint first, then the last: a kill between them repeats the epoch with the same best.

    Args:
        trainer: State after the epoch, with `record` in its history.
        record: Results of the epoch.
        detector: Deployable detector of the epoch.

    Returns:
        Whether the epoch is the best so far.
    """
    config = trainer.config
    is_best = record.meets_target and find_best_record(trainer.history) is record
    if is_best:
        best = DetectorCheckpoint.from_detector(
            detector, config.model, config.as_dict(), record.epoch, record.miss_rate
        )
        save_detector_checkpoint(config.save_path / "best.pt", best)
    state = {
        "config": config.as_dict(),
        "distiller": trainer.distiller.state_dict(),
        "ema": trainer.ema.module.state_dict(),
        "ema_updates": trainer.ema.num_updates,
        "optimizer": trainer.optimizer.state_dict(),
        "balancer": trainer.balancer.state_dict(),
        "history": [past.as_dict() for past in trainer.history],
        "teacher_sha256": trainer.teacher_sha256,
        "results": trainer.results.as_dict(),
    }
    save_training_state(config.save_path / "last.pt", state)
    write_history(config.save_path / "results.csv", trainer.history)
    return is_best


def load_epoch(trainer: "Trainer", path: Path) -> None:
    """Restore the state after the last finished epoch.

    Args:
        trainer: A new trainer of the same run.
        path: `last.pt` of the run.

    Raises:
        DataError: If the file belongs to another run.
    """
    config = trainer.config
    state = load_training_state(path)
    saved = TrainConfig.from_dict(state["config"])
    if saved.model != config.model:
        raise DataError(f"{path}: expected a run of {config.model}, got {saved.model}. Start a new run.")
    if saved.distill != config.distill:
        raise DataError(
            f"{path}: the run has other settings under distill. Use those in its config.yaml, or start a new run."
        )
    if state.get("teacher_sha256", trainer.teacher_sha256) != trainer.teacher_sha256:
        raise DataError(
            f"{path}: the teacher {config.teacher} has changed since. Restore that file, or start a new run."
        )
    try:
        trainer.distiller.load_state_dict(state["distiller"])
        trainer.ema.module.load_state_dict(state["ema"])
        trainer.ema.num_updates = state["ema_updates"]
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.balancer.load_state_dict(state["balancer"])
        trainer.history = [EpochRecord(**record) for record in state["history"]]
        trainer.results = RunResults.from_dict(state.get("results", {}))
    except (KeyError, TypeError, RuntimeError) as error:  # missing keys, unknown keys, other shapes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise DataError(
            f"{path}: does not fit this run ({reason}). Another version of hkd-det wrote it, or --weights or "
            "--teacher has changed. Start a new run."
        ) from error
