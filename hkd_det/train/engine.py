"""One training epoch, evaluation, the moving average of the weights, and the record of an epoch."""

import copy
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hkd_det.datasets import Sample, read_image
from hkd_det.distill.distiller import Distiller
from hkd_det.distill.gradients import GradientBalancer
from hkd_det.errors import DataError, HkdError
from hkd_det.files import write_text
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import SETUPS, CityPersonsSetup, evaluate_detections
from hkd_det.models.base import BaseDetector
from hkd_det.ops.losses import sum_losses
from hkd_det.structures import Detections
from hkd_det.train.config import TrainConfig, compute_distill_weight
from hkd_det.train.dataset import Batch, iterate_batches


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
    progress: "tqdm[None] | None" = None,
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
        progress: Progress bar, one unit per step.

    Returns:
        losses: Mean of each loss over the steps.
        metrics: Mean of each value that balancer and methods log.

    Raises:
        DataError: If the loss is not finite.
    """
    losses_sum: dict[str, float] = {}
    metrics_sum: dict[str, float] = {}
    num_steps = len(loader)
    distill_weight = compute_distill_weight(epoch, config.epochs, config.no_distill_ratio, config.distill_schedule)
    for index, (images, targets) in enumerate(iterate_batches(loader)):
        step = epoch * num_steps + index
        lr = lr_schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        distiller.before_step(step)
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)  # noqa: PLW2901 - same batch
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
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
            progress.update()
            progress.set_postfix({k: f"{v / (index + 1):.2f}" for k, v in losses_sum.items()}, refresh=False)
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
    """

    miss_rate: float
    miss_rates: dict[str, float]
    num_gt: dict[str, int]
    detections: list[Detections]


def evaluate(
    model: BaseDetector, samples: Sequence[Sample], config: TrainConfig, setups: Iterable[CityPersonsSetup] = ()
) -> EvalResult:
    """Run a detector as it is deployed, and compute its miss rate.

    Args:
        model: Detector in evaluation mode.
        samples: Annotated images.
        config: Configuration with input size, precision and setup.
        setups: Further setups to evaluate.

    Returns:
        Miss rates and detections.
    """
    detections = predict_dataset(model, samples, config.imgsz_hw, bf16=config.precision == "bf16")
    results = evaluate_detections(samples, detections, list(dict.fromkeys((SETUPS[config.setup], *setups))))
    return EvalResult(
        results[config.setup].value,
        {name: result.value for name, result in results.items()},
        {name: result.num_gt for name, result in results.items()},
        detections,
    )


@torch.no_grad()
def predict_dataset(
    detector: BaseDetector, samples: Sequence[Sample], imgsz_hw: tuple[int, int], bf16: bool, batch: int = 8
) -> list[Detections]:
    """Run a detector on all samples.

    Args:
        detector: Detector in evaluation mode.
        samples: Images.
        imgsz_hw: Input height and width, pixels.
        bf16: Whether to use mixed precision.
        batch: Batch size.

    Returns:
        Detections of each image without a score threshold, source pixels.
    """
    device = next(detector.parameters()).device
    detections: list[Detections] = []
    for start in tqdm(range(0, len(samples), batch), desc="evaluate", unit="batch", leave=False):
        images = [read_image(sample.path) for sample in samples[start : start + batch]]
        letterboxes = [Letterbox((image.shape[0], image.shape[1]), imgsz_hw) for image in images]
        inputs = np.stack([letterbox.apply(image) for letterbox, image in zip(letterboxes, images, strict=True)])
        tensor = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            boxes, scores = detector.predict(tensor)
        arrays = zip(letterboxes, boxes.float().cpu().numpy(), scores.cpu().numpy(), strict=True)
        detections += [Detections(letterbox.boxes_to_source(b), s) for letterbox, b, s in arrays]
    return detections


@dataclass(frozen=True)
class EpochRecord:
    """Results of one epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        losses: Mean of each loss.
        miss_rate: Validation MR^-2 of the setup of the run, fraction.
        images_per_s: Training speed, images per second.
        metrics: Means of other logged values, such as the weights of a gradient balancer.
        meets_target: Whether the epoch may become `best.pt`. A student that is pruned must have its final size.
    """

    epoch: int
    losses: dict[str, float]
    miss_rate: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    meets_target: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for checkpoints."""
        return asdict(self)

    def log_line(self, epochs: int, setup: str) -> str:
        """Format the record for the terminal.

        Args:
            epochs: Number of epochs of the run.
            setup: Name of the setup of `miss_rate`.

        Returns:
            One line.
        """
        return (
            f"epoch {self.epoch}/{epochs}  loss {sum(self.losses.values()):.3f}  "
            f"MR^-2 {setup} {100 * self.miss_rate:.2f} %  {self.images_per_s:.1f} images/s"
        )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """Write one row per epoch to a CSV file. A value that an epoch does not have stays empty.

    Args:
        path: File to write.
        history: Records in the order of epochs.
    """
    names = list(dict.fromkeys(name for record in history for name in record.losses | record.metrics))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *names, "miss_rate", "images_per_s"], lineterminator="\n")
    writer.writeheader()
    for record in history:
        fixed = {"epoch": record.epoch, "miss_rate": record.miss_rate, "images_per_s": record.images_per_s}
        writer.writerow({**fixed, **record.losses, **record.metrics})
    write_text(path, text.getvalue())
