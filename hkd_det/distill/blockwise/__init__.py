"""Parallel blockwise distillation (Blakeney, Li, Yan, Zong: IEEE TPDS 2021, arXiv 2012.03096).

Every 3x3 convolution of some parts of a trained teacher is replaced by a depthwise-separable block b. Each block is
trained separately. It minimizes the mean of (b(x) - y)^2, where x is the input of the convolution in the frozen teacher
and y the teacher's output behind the following normalization. The blocks are independent, so several workers train them
in parallel. Afterwards all blocks are assembled and fine-tuned as one network.

Modules: `blocks` finds the convolutions, records their inputs and assembles the network, `worker` holds the settings
and trains one block, `executor` schedules and runs the tasks, `stage` trains all blocks. This module runs the whole
method and writes the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from hkd_det.console import Progress, log_line
from hkd_det.distill.base import DistillMethod, RunContext
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.blockwise.blocks import StateDict, assemble, find_replaceable_convs
from hkd_det.distill.blockwise.executor import Scheduler, compute_lower_bound, simulate
from hkd_det.distill.blockwise.stage import BlockwiseStage, StageResult, create_npy, read_blocks, train_blocks
from hkd_det.distill.blockwise.worker import BlockwiseConfig
from hkd_det.errors import DataError, UsageError
from hkd_det.files import write_text
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint, weights_sha256
from hkd_det.models.zoo import count_params_and_flops, load_detector

SIMULATED_WORKERS = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class AssemblyResult:
    """Assembled network, evaluated on the validation split before fine-tuning.

    Attributes:
        teacher_miss_rate: MR^-2 of the teacher in the run's setup, 0 to 1.
        miss_rate: MR^-2 of the assembled network, 0 to 1.
        block_miss_rates: MR^-2 of the teacher with one block, by layer; empty if blocks were not evaluated.
        excluded_layers: Layers that keep their convolution.
        parameters: Parameters of teacher and assembled network.
        flops: FLOPs per image of teacher and assembled network.
    """

    teacher_miss_rate: float
    miss_rate: float
    block_miss_rates: dict[str, float]
    excluded_layers: list[str]
    parameters: tuple[int, int]
    flops: tuple[int, int]


class Blockwise(DistillMethod):
    """Replaces convolutions of the teacher by separable blocks, which are trained in parallel."""

    Config = BlockwiseConfig
    requires = frozenset({"features", "same_architecture"})
    conflicts = frozenset({"cdd"})
    has_losses = False
    student_source = "prepared"

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:  # noqa: ARG002 - interface
        """Return no losses."""
        return {}

    @classmethod
    def prepare_student(cls, config: BlockwiseConfig, context: RunContext) -> Path:
        """Train the blocks that are missing, assemble the student and measure it.

        Blocks of an interrupted call with the same settings are kept. `blockwise/report.json` describes the result.

        Args:
            config: Settings of the method.
            context: Directory, teacher and data of the run.

        Returns:
            Checkpoint `blockwise/assembled.pt` in the directory of the run.

        Raises:
            UsageError: Several processes run, or no convolution can be replaced.
            DataError: Every block exceeds `max_mr_increase`.
        """
        path = context.save_dir / "blockwise" / "assembled.pt"
        if context.resume and path.exists():
            return path
        if context.world_size > 1:
            raise UsageError(
                "--distill blockwise: blocks are trained by separate workers, not under torchrun. Start without "
                "torchrun (distill.blockwise.workers), then fine-tune under torchrun with "
                "--weights blockwise/assembled.pt."
            )
        teacher = load_detector(context.teacher).to(context.torch_device).requires_grad_(False)
        layers = find_replaceable_convs(teacher, context.imgsz_hw, config.parts, config.min_channels)
        log_line(f"blockwise: {len(layers)} blocks, from {layers[0].name} to {layers[-1].name}")
        stage = BlockwiseStage(
            path.parent,
            partial(load_detector, context.teacher.resolve()),
            partial(_write_images, context, config.num_images),
            config,
            {"teacher": weights_sha256(teacher.state_dict()), **context.fingerprint},
            context.seed,
            context.device,
        )
        stage_result = train_blocks(stage, teacher, layers)
        student, result = _assemble_student(config, context, teacher, read_blocks(path.parent, layers))
        checkpoint = DetectorCheckpoint.from_detector(
            student, context.model, dict(context.settings), 0, result.miss_rate
        )
        save_detector_checkpoint(path, checkpoint)
        write_blockwise_report(path.with_name("report.json"), stage_result, config.scheduler, result)
        log_line(_format_assembly(context.setup, result, len(layers)))
        return path


def write_blockwise_report(
    path: Path, stage_result: StageResult, scheduler: Scheduler, assembly_result: AssemblyResult
) -> None:
    """Write `report.json`: results of the blocks, timing, and simulated makespans (`simulated_s`).

    Times are in seconds. `run_stats` is null if the stage was interrupted and resumed.

    Args:
        path: File to write.
        stage_result: Results of the block stage.
        scheduler: Schedule of the run.
        assembly_result: The assembled network.
    """
    times = [block.seconds for block in stage_result.block_results]
    stats = stage_result.run_stats
    content: dict[str, Any] = {
        "scheduler": scheduler,
        "run_stats": {**asdict(stats), "lower_bound_s": compute_lower_bound(times, stats.num_workers)}
        if stats
        else None,
        "sum_s": sum(times),
        "simulated_s": simulate_makespans(times),
        **asdict(assembly_result),
        "blocks": [{**asdict(block), "residual_ratio": block.residual_ratio} for block in stage_result.block_results],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def simulate_makespans(times: Sequence[float]) -> dict[str, dict[str, float]]:
    """Simulate every schedule on `SIMULATED_WORKERS`.

    Args:
        times: Measured time of each block, seconds.

    Returns:
        Makespans in seconds by schedule and number of workers, and their lower bound.
    """
    makespans = {name: {str(n): simulate(times, n, name) for n in SIMULATED_WORKERS} for name in get_args(Scheduler)}
    return {**makespans, "lower bound": {str(n): compute_lower_bound(times, n) for n in SIMULATED_WORKERS}}


def _write_images(context: RunContext, num_images: int, path: Path) -> None:
    """Write augmented training images of the run's size to a .npy file, [num_images, 3, H, W] uint8 RGB."""
    with (
        create_npy(path, (num_images, 3, *context.imgsz_hw), np.uint8) as array,
        Progress(num_images, "write images", "image") as progress,
    ):
        written = 0
        for images in context.iterate_images(num_images):
            batch = images[: num_images - written].numpy()
            array[written : written + len(batch)] = batch
            written += len(batch)
            progress.update(len(batch))
            if written == num_images:
                break


def _assemble_student(
    config: BlockwiseConfig, context: RunContext, teacher: BaseDetector, blocks: Mapping[str, StateDict]
) -> tuple[BaseDetector, AssemblyResult]:
    """Replace the convolutions whose block stays within `max_mr_increase`, and measure the result."""
    teacher_rate = context.evaluate(teacher)
    block_rates = (
        {layer: context.evaluate(assemble(teacher, {layer: blocks[layer]})) for layer in blocks}
        if config.evaluate_blocks
        else {}
    )
    included = [
        layer for layer in blocks if block_rates.get(layer, teacher_rate) - teacher_rate <= config.max_mr_increase
    ]
    if not included:
        smallest = 100 * (min(block_rates.values()) - teacher_rate)
        raise DataError(
            f"distill.blockwise.max_mr_increase={config.max_mr_increase}: every block alone raises the miss rate by "
            f"more, at least {smallest:.2f} points. Raise the limit, or train the blocks "
            "longer (distill.blockwise.epochs)."
        )
    student = assemble(teacher, {layer: blocks[layer] for layer in included})
    before, after = (count_params_and_flops(model, context.imgsz_hw) for model in (teacher, student))
    return student, AssemblyResult(
        teacher_rate,
        context.evaluate(student),
        block_rates,
        [layer for layer in blocks if layer not in included],
        (before.num_params, after.num_params),
        (before.flops, after.flops),
    )


def _format_assembly(setup: str, result: AssemblyResult, num_blocks: int) -> str:
    (params_before, params_after), (flops_before, flops_after) = result.parameters, result.flops
    return (
        f"assembled: {num_blocks - len(result.excluded_layers)} of {num_blocks} blocks, "
        f"{params_before / 1e6:.2f} M to {params_after / 1e6:.2f} M parameters, "
        f"{flops_before / 1e9:.2f} to {flops_after / 1e9:.2f} GFLOPs, MR^-2 {setup} "
        f"{100 * result.teacher_miss_rate:.2f} % to {100 * result.miss_rate:.2f} % before fine-tuning"
    )
