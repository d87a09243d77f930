"""The block stage of a run with `--distill blockwise`: from a teacher to `blockwise/assembled.pt`, then fine-tuned."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.distill.blockwise.activations import new_array
from hkd_det.distill.blockwise.assembly import Weights, assembled
from hkd_det.distill.blockwise.replaceable import replaceable
from hkd_det.distill.blockwise.report import Assembled, write_report
from hkd_det.distill.blockwise.settings import Blockwise
from hkd_det.distill.blockwise.stage import Stage, learn_blocks, read_blocks
from hkd_det.distill.distiller import Distiller
from hkd_det.errors import DataError, UsageError
from hkd_det.models.family import PersonDetector
from hkd_det.models.sizes import cost
from hkd_det.train.checkpoint import DetectorCheckpoint, weights_sha256, write_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.loader import Epochs, batches, open_loader
from hkd_det.train.processes import Processes
from hkd_det.train.teachers import open_teacher
from hkd_det.train.validate import miss_rate


def assemble(
    config: TrainConfig,
    settings: Blockwise,
    processes: Processes,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    resume: bool,
) -> Path:
    """The checkpoint of the teacher with its blocks replaced; learns what of it is not there yet.

    With `resume` one that is there is taken as it is. `blockwise/report.json` beside it tells how it came about.
    """
    path = config.run_dir / "blockwise" / "assembled.pt"
    if resume and path.exists():
        return path
    if processes.count > 1:
        raise UsageError(
            "blocks are learnt by workers of their own, not under torchrun: start without it "
            "(distill.blockwise.workers), then fine-tune under torchrun with --init blockwise/assembled.pt"
        )
    teacher = open_teacher(Path(config.teacher)).to(processes.device).requires_grad_(False)
    if config.distill.in_training.names:  # what can't be is said now, not when the blocks are learnt
        Distiller(deepcopy(teacher), teacher, config.distill.in_training).close()
    layers = replaceable(teacher, config.imgsz_hw, settings.parts, settings.least)
    tqdm.write(f"blockwise: {len(layers)} blocks, from {layers[0].name} to {layers[-1].name}")
    stage = Stage(
        path.parent,
        partial(open_teacher, Path(config.teacher).resolve()),
        partial(_draw_views, config, settings.views, training),
        settings,
        _identity(config, teacher),
        config.seed,
        config.device,
    )
    course = learn_blocks(stage, teacher, layers)
    blocks = read_blocks(path.parent, layers)
    student, result = _put_together(config, settings, teacher, blocks, validation)
    write_detector(path, DetectorCheckpoint.of(student, config.model, config.as_dict(), 0, result.miss_rate))
    write_report(path.with_name("report.json"), course, settings.scheduler, result)
    tqdm.write(_told(config, result, len(layers)))
    return path


def _identity(config: TrainConfig, teacher: PersonDetector) -> dict[str, object]:
    """What fixes the blocks beside the method's own settings; a stage with another identity starts over."""
    return {
        "teacher": weights_sha256(teacher.state_dict()),
        "data": config.data,
        "imgsz_hw": list(config.imgsz_hw),
        "mosaic": config.mosaic,
        "views_batch": config.batch,  # which views are drawn depends on it
        "seed": config.seed,
    }


def _draw_views(config: TrainConfig, count: int, samples: Sequence[Sample], path: Path) -> None:
    """Write `count` training views, all of the run's size: [count, 3, H, W] uint8 RGB."""
    epochs = Epochs(len(samples), min(config.batch, count), config.imgsz_hw, 0.0, config.mosaic, config.seed)
    loader, sampler = open_loader(samples, epochs, 0, 1, config.workers, config.cache_mib)
    with new_array(path, (count, 3, *config.imgsz_hw), np.uint8) as views, tqdm(total=count, desc="views") as bar:
        drawn = 0
        while drawn < count:
            for pictures, _ in batches(loader):
                taken = pictures[: count - drawn].numpy()
                views[drawn : drawn + len(taken)] = taken
                drawn += len(taken)
                bar.update(len(taken))
                if drawn == count:
                    break
            sampler.epoch += 1


def _put_together(
    config: TrainConfig,
    settings: Blockwise,
    teacher: PersonDetector,
    blocks: dict[str, Weights],
    validation: Sequence[Sample],
) -> tuple[PersonDetector, Assembled]:
    """The network of those blocks that stay within the limit, and how it compares with the teacher."""
    judged = partial(miss_rate, config, validation)
    best = judged(teacher)
    alone = {layer: judged(assembled(teacher, {layer: blocks[layer]})) for layer in blocks} if settings.judge else {}
    taken = [layer for layer in blocks if alone.get(layer, best) - best <= settings.limit]
    if not taken:
        raise DataError(
            f"distill.blockwise.limit={settings.limit}: every block alone raises the miss rate by more, "
            f"{100 * (min(alone.values()) - best):.2f} points at least; raise it, or learn longer"
        )
    student = assembled(teacher, {layer: blocks[layer] for layer in taken})
    before, after = cost(teacher, config.imgsz_hw), cost(student, config.imgsz_hw)
    return student, Assembled(
        best,
        judged(student),
        alone,
        [layer for layer in blocks if layer not in taken],
        (before.parameters, after.parameters),
        (before.flops, after.flops),
    )


def _told(config: TrainConfig, result: Assembled, count: int) -> str:
    (parameters, parameters_now), (flops, flops_now) = result.parameters, result.flops
    return (
        f"assembled: {count - len(result.left_out)} of {count} blocks, parameters {parameters / 1e6:.2f} M to "
        f"{parameters_now / 1e6:.2f} M, {flops / 1e9:.2f} to {flops_now / 1e9:.2f} GFLOPs, MR^-2 {config.setup} "
        f"{100 * result.miss_rate_teacher:.2f} % to {100 * result.miss_rate:.2f} % before fine-tuning"
    )
