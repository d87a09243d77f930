"""Choice of a method's setting by short runs, each tested on training images that it was not trained on.

Validation and test images have no part in the choice, so that it does not bias their miss rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hkd_det.console import format_table, log_line, log_stage
from hkd_det.datasets import Sample
from hkd_det.distill import load_method
from hkd_det.errors import DataError, UsageError
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.checkpoint import load_training_state
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import DistributedContext, make_epoch_plan, make_run_context
from hkd_det.train.engine import evaluate

if TYPE_CHECKING:
    from hkd_det.train.trainer import Trainer

HELD_OUT_RATIO = 0.1  # of the training images
EPOCH_RATIO = 0.05  # length of a short run, ratio of the epochs of the whole run; at least one epoch
HELD_OUT_STREAM = 1  # other random numbers than those of the epochs, which have the same seed


def choose_method_configs(
    config: TrainConfig,
    trainer_type: "type[Trainer]",
    dist_context: DistributedContext,
    samples: Sequence[Sample],
    unlabeled_samples: Sequence[Sample],
    resume: bool,
) -> TrainConfig:
    """Replace each method configuration that has candidates by the one with the lowest miss rate.

    Args:
        config: Configuration of the run.
        trainer_type: Class that trains.
        dist_context: Processes of the run.
        samples: Labeled training images.
        unlabeled_samples: Unlabeled training images.
        resume: Whether the run continues an earlier one, whose choice is kept.

    Returns:
        The configuration with complete method configurations.

    Raises:
        UsageError: If several processes run, or the student is made in a stage before training.
        DataError: If the held-out images contain no person.
    """
    for name, method_config in config.distill.items():
        candidates = load_method(name).candidate_configs(method_config)
        if not candidates:
            continue
        if resume:
            saved = TrainConfig.from_dict(load_training_state(config.save_path / "last.pt")["config"])
            chosen = saved.distill.get(name, candidates[0])
        else:
            _check_run(config, name, dist_context)
            measure = partial(_measure, trainer_type, dist_context, unlabeled_samples)
            chosen = _choose(config, name, candidates, split_held_out(samples, config.seed), measure)
        config = replace(config, distill={**config.distill, name: chosen})
    return config


def split_held_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a random tenth of the training images.

    Args:
        samples: Labeled training images.
        seed: Seed of the run.

    Returns:
        train: Images to train on.
        held_out: Images to test on, at least one.
    """
    order = np.random.default_rng((HELD_OUT_STREAM, seed)).permutation(len(samples))
    held_out = set(order[: max(1, round(HELD_OUT_RATIO * len(samples)))].tolist())
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for index, sample in enumerate(samples):
        parts[index in held_out].append(sample)
    return parts


def _check_run(config: TrainConfig, name: str, dist_context: DistributedContext) -> None:
    prepared = [other for other in config.distill if load_method(other).student_source == "prepared"]
    if prepared:
        raise UsageError(f"distill.{name}: a choice requires a student, but {prepared[0]} makes it later. Set a value.")
    if dist_context.world_size > 1:
        raise UsageError(f"distill.{name}: a choice requires one process. Run it without torchrun, then set its value.")


def _choose(
    config: TrainConfig,
    name: str,
    candidates: Sequence[Any],
    parts: tuple[Sequence[Sample], Sequence[Sample]],
    measure: Callable[[TrainConfig, Sequence[Sample], Sequence[Sample]], float],
) -> Any:
    train, held_out = parts
    setup, labels = SETUPS[config.setup], _describe(candidates)
    num_persons = evaluate_detections(held_out, [], [setup])[setup.name].num_gt
    if not train or not num_persons:
        raise DataError(
            f"distill.{name}: the {len(held_out)} held-out training images have no person of setup {setup.name} to "
            f"choose between {' and '.join(labels)}. Set a value."
        )
    epochs = max(1, round(EPOCH_RATIO * config.epochs))
    short = replace(config, epochs=epochs, patience=0, no_distill_ratio=0.0)
    miss_rates = []
    for candidate, label in zip(candidates, labels, strict=True):
        log_stage(f"distill.{name}: {label}, epochs={epochs}, {len(train)} training images")
        miss_rates.append(measure(replace(short, distill={**config.distill, name: candidate}), train, held_out))
    best = int(np.argmin(miss_rates))  # the first of equal ones
    rows = [(label, f"{100 * miss_rate:.2f} %") for label, miss_rate in zip(labels, miss_rates, strict=True)]
    table = format_table(rows, (f"distill.{name}", f"MR^-2 {setup.name}"))
    log_line(f"{len(held_out)} held-out training images with {num_persons} persons\n{table}\nchosen: {labels[best]}")
    if min(miss_rates) == max(miss_rates):
        log_line(f"warning: distill.{name}: the short runs do not distinguish the values. Set one, or train longer.")
    return candidates[best]


def _measure(
    trainer_type: "type[Trainer]",
    dist_context: DistributedContext,
    unlabeled_samples: Sequence[Sample],
    config: TrainConfig,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
) -> float:
    """Train from the start of the run, and return the miss rate on the held-out images."""
    plan = make_epoch_plan(config, len(train), len(unlabeled_samples))
    context = make_run_context(config, plan, dist_context, train, held_out, resume=False)
    weights = Path(config.weights) if config.weights else None
    trainer = trainer_type(config, plan, context, dist_context, [*train, *unlabeled_samples], held_out, weights)
    for epoch in range(config.epochs):
        trainer.start_epoch(epoch)
        trainer.run_epoch_steps(epoch)
    trainer.distiller.close()
    return evaluate(trainer.distiller.deployable_model(trainer.ema.module), held_out, config).miss_rate


def _describe(candidates: Sequence[Any]) -> list[str]:
    """Return the settings in which the candidates differ, such as "sigma=0.5"."""
    rows = [asdict(candidate) for candidate in candidates]
    changed = [key for key in rows[0] if any(row[key] != rows[0][key] for row in rows)]
    return [", ".join(f"{key}={row[key]}" for key in changed) for row in rows]
