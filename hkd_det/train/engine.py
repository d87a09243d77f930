"""One training epoch, evaluation, and the moving average of the weights."""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hkd_det.console import Progress, iterate_with_progress
from hkd_det.datasets import Sample, read_image
from hkd_det.distill.distiller import Distiller
from hkd_det.distill.gradients import GradientBalancer
from hkd_det.errors import DataError, HkdError
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import SETUPS, CityPersonsSetup, evaluate_detections
from hkd_det.metrics.matching import MissRateResult, OperatingPoint, suggest_operating_point
from hkd_det.models.base import BaseDetector
from hkd_det.ops.losses import sum_losses
from hkd_det.structures import Detections
from hkd_det.train.config import TrainConfig, compute_distill_weight
from hkd_det.train.dataset import Batch, iterate_batches

MIN_SCORE = 0.001  # lowest score of an evaluated detection; exported models have the same limit


class ModelEma:
    """Exponential moving average of a detector, with decay min(decay, (1 + n) / (10 + n)) in update n.

    timm's `ModelEmaV3` warms up by another formula (1 - (1 + n / gamma)^-power) and would change the weights.

    Args:
        detector: Detector to follow. Register hooks on it afterwards: they would be copied.
        decay: Maximum decay, 0 to 1.

    Attributes:
        module: The averaged detector, in evaluation mode.
        num_updates: Number of updates so far.
    """

    def __init__(self, detector: BaseDetector, decay: float) -> None:
        self.module = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, detector: BaseDetector) -> None:
        """Move the average toward the detector, running statistics included; copy integer buffers.

        Args:
            detector: Detector in training.
        """
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current: dict[str, Tensor] = detector.state_dict()
        for name, mean in self.module.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether training uses mixed precision with bfloat16.

    Without hardware support torch emulates bfloat16, which is much slower than float32.

    Args:
        precision: "auto", "bf16" or "fp32".
        device: Device that trains.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512"  # what oneDNN requires for bfloat16


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader[Batch | HkdError],
    optimizer: torch.optim.Optimizer,
    balancer: GradientBalancer,
    ema: ModelEma,
    lr_schedule: Callable[[int], float],
    distiller: Distiller,
    device: torch.device,
    epoch: int,
    config: TrainConfig,
    progress: Progress | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train for one epoch.

    Args:
        model: `distiller`, or its DDP wrapper.
        loader: Batches of the epoch.
        optimizer: Optimizer of the parameters of `model`.
        balancer: Runs the backward pass of both losses.
        ema: Moving average of the student.
        lr_schedule: Returns the learning rate of a step, counted over the whole run.
        distiller: Student, teacher and methods. The methods act before and after the optimizer step.
        device: Device of the model.
        epoch: Index of the epoch, from 0.
        config: Configuration of the run.
        progress: Progress of the run, one unit per step.

    Returns:
        losses: Mean of each loss over the steps.
        metrics: Mean of each value that balancer and methods log.

    Raises:
        DataError: If the loss is not finite.
    """
    losses_sum: dict[str, float] = {}
    metrics_sum: dict[str, float] = {}
    num_steps, bf16 = len(loader), uses_bf16(config.precision, device)
    distill_weight = compute_distill_weight(
        epoch, config.epochs, config.no_distill_ratio, config.distill_schedule, config.min_distill_weight
    )
    for index, (images, targets) in enumerate(iterate_batches(loader)):
        step = epoch * num_steps + index
        lr = lr_schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        distiller.before_step(step)
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)  # noqa: PLW2901 - same batch
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            det_losses, distill_losses = model(images, targets.to(device), distill_weight)
        losses = det_losses | distill_losses
        loss = sum_losses(losses)
        if not torch.isfinite(loss):
            raise DataError(
                f"lr={config.lr}: the loss is {loss.item()} in epoch {epoch + 1}, step {index + 1}. "
                "Reduce it (--set lr=)."
            )
        optimizer.zero_grad(set_to_none=True)
        det_loss = sum_losses(det_losses) if det_losses else torch.zeros_like(loss)
        distill_loss = sum_losses(distill_losses) if distill_losses else None
        metrics = balancer.backward(det_loss, distill_loss, distill_weight)
        metrics |= distiller.after_backward(step)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        distiller.after_step()
        ema.update(distiller.student)
        _accumulate(losses_sum, {name: float(value.detach()) for name, value in losses.items()})
        _accumulate(metrics_sum, metrics)
        if progress is not None:
            progress.update(values=_divide(losses_sum, index + 1))
    return _divide(losses_sum, num_steps), _divide(metrics_sum, num_steps)


def _accumulate(totals: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def _divide(totals: dict[str, float], count: int) -> dict[str, float]:
    return {name: value / count for name, value in totals.items()}


@dataclass(frozen=True)
class EvalResult:
    """Accuracy of a detector on annotated images.

    Attributes:
        miss_rate: MR^-2 of the setup of the run, fraction.
        miss_rates: MR^-2 by setup, fraction; -1 for a setup without ground truth.
        num_gt: Ground-truth boxes by setup.
        detections: Detections of each image, source pixels.
        operating_point: Suggested score threshold, with recall and precision in the setup of the run.
        result: Curve of the setup of the run.
    """

    miss_rate: float
    miss_rates: dict[str, float]
    num_gt: dict[str, int]
    detections: list[Detections]
    operating_point: OperatingPoint
    result: MissRateResult


def evaluate(
    model: BaseDetector, samples: Sequence[Sample], config: TrainConfig, setups: Iterable[CityPersonsSetup] = ()
) -> EvalResult:
    """Run a detector as it is deployed, in FP32, and compute its miss rate.

    Args:
        model: Detector in evaluation mode.
        samples: Annotated images.
        config: Configuration with input size and setup.
        setups: Further setups to evaluate.

    Returns:
        Miss rates and detections.
    """
    detections = predict_dataset(model, samples, config.imgsz_hw)
    results = evaluate_detections(samples, detections, list(dict.fromkeys((SETUPS[config.setup], *setups))))
    return EvalResult(
        results[config.setup].value,
        {name: result.value for name, result in results.items()},
        {name: result.num_gt for name, result in results.items()},
        detections,
        suggest_operating_point(results[config.setup]),
        results[config.setup],
    )


@torch.no_grad()
def predict_dataset(
    detector: BaseDetector, samples: Sequence[Sample], imgsz_hw: tuple[int, int], bf16: bool = False, batch: int = 8
) -> list[Detections]:
    """Run a detector on all samples. Convolutions do not use TF32, which rounds FP32 values to 10 mantissa bits.

    Args:
        detector: Detector in evaluation mode.
        samples: Images.
        imgsz_hw: Input height and width, pixels.
        bf16: Whether to use mixed precision. Exported models are FP32: their scores differ from those of bf16.
        batch: Batch size.

    Returns:
        Detections of each image with scores from `MIN_SCORE`, source pixels.
    """
    device = next(detector.parameters()).device
    detections: list[Detections] = []
    starts = range(0, len(samples), batch)
    for start in iterate_with_progress(starts, len(starts), "evaluate", "batch"):
        images = [read_image(sample.path) for sample in samples[start : start + batch]]
        letterboxes = [Letterbox((image.shape[0], image.shape[1]), imgsz_hw) for image in images]
        inputs = np.stack([letterbox.apply(image) for letterbox, image in zip(letterboxes, images, strict=True)])
        tensor = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), _disable_tf32():
            boxes, scores = detector.predict(tensor)
        arrays = zip(letterboxes, boxes.float().cpu().numpy(), scores.cpu().numpy(), strict=True)
        detections += [Detections(letterbox.boxes_to_source(b), s).filter(MIN_SCORE) for letterbox, b, s in arrays]
    return detections


def _disable_tf32() -> AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    context: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
    return context
