"""Settings of blockwise distillation, and the training of one block.

The block replaces one convolution. It is trained from the teacher's activations before and after the convolution.

The target is the output of the normalization that follows the convolution, before the activation. Before the
normalization, channels of large variance would dominate the loss although the network scales them down. After the
activation, negative values would give no gradient. The block is trained with a normalization of its own, whose
statistics, scale and shift replace those of the teacher.

A convolution that the levels of a pyramid share is one task. Its inputs are those of all levels, its errors are means
over the levels, and each level has its own normalization.

Random numbers depend on the run's seed and the layer's name, and the arithmetic uses one thread. A block is therefore
the same on any worker and at any time.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hkd_det.config import check_range
from hkd_det.distill.blockwise.blocks import LayerInputs, ReplaceableConv, assemble, force_deterministic
from hkd_det.distill.blockwise.executor import Scheduler, get_worker_index
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write
from hkd_det.models.base import BaseDetector, DetectorPart
from hkd_det.models.surgery import SeparableConvBlock, make_block

InputSource = Literal["teacher", "student"]

HOLDOUT_STEP = 8  # every eighth image is used for measurement, not for training


@dataclass(frozen=True)
class BlockwiseConfig:
    """Settings of blockwise distillation.

    Attributes:
        parts: Parts of the detector whose 3x3 convolutions are replaced: backbone, neck, head. A convolution that the
            levels of a pyramid share becomes one block.
        min_channels: Minimum number of input and output channels of a replaced convolution.
        num_images: Number of augmented training images for all blocks. An eighth of them is held out to measure errors.
        epochs: Epochs of each block.
        batch: Batch size of each block.
        lr: Learning rate of each block.
        input_source: "teacher": a block is trained on the teacher's activations, so that all blocks are independent.
            "student": on those of a network with all earlier blocks replaced, one after the other (control experiment).
        cache_mib: Disk space in the run directory for activations, MiB. The others are computed again in each step.
        workers: Number of parallel tasks. 1 runs in this process; more use Dask.
        scheduler: Assignment of blocks to workers.
        cluster: Address of a running Dask scheduler, "tcp://host:port", instead of local workers. Its workers must see
            the run directory under the same path.
        timing_report: `report.json` of an earlier run whose times plan the schedule; "" estimates them from FLOPs.
        retries: Number of worker crashes that a task survives.
        evaluate_blocks: Whether to measure the miss rate with each block alone.
        max_mr_increase: Maximum increase of the miss rate by a block, fraction. Blocks above it are left out.
    """

    parts: tuple[DetectorPart, ...] = ("backbone",)
    min_channels: int = 16
    num_images: int = 512
    epochs: int = 8
    batch: int = 16
    lr: float = 2e-3
    input_source: InputSource = "teacher"
    cache_mib: int = 8192
    workers: int = 1
    scheduler: Scheduler = "bin-packing"
    cluster: str = ""
    timing_report: str = ""
    retries: int = 3
    evaluate_blocks: bool = False
    max_mr_increase: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_channels", "epochs", "batch", "workers"):
            check_range(f"distill.blockwise.{name}", getattr(self, name), 1)
        for name in ("cache_mib", "retries"):
            check_range(f"distill.blockwise.{name}", getattr(self, name), 0)
        check_range("distill.blockwise.num_images", self.num_images, 2)
        check_range("distill.blockwise.lr", self.lr, 0, is_open=True)
        if self.cluster and self.workers > 1:
            raise UsageError(
                "distill.blockwise.workers: has no effect with cluster, which has workers of its own. Omit one."
            )
        if self.input_source == "student" and (self.workers > 1 or self.cluster):
            raise UsageError(
                "distill.blockwise.input_source=student: each block depends on the blocks before it. "
                "Omit distill.blockwise.workers and cluster."
            )
        if self.max_mr_increase < 1 and not self.evaluate_blocks:
            raise UsageError(
                "distill.blockwise.max_mr_increase: the blocks are not measured. "
                "Set distill.blockwise.evaluate_blocks=true."
            )


@dataclass(frozen=True)
class BlockTask:
    """A block to train, in any process that can read the directory of the run.

    Attributes:
        layer: The teacher's convolution.
        load_teacher: Returns the teacher.
        images_path: .npy file with the images, uint8 [N, 3, H, W].
        input_cache: .npy file with the inputs of the layer, or None to compute them.
        preceding_blocks: Files of trained blocks that are inserted into the network that computes this block's inputs.
        output_path: File to write the block to.
        config: Settings of the method.
        seed: Seed of the run.
        device: "cpu", "cuda" (the CUDA devices of the machine in turn), "cuda:N", or "auto" ("cuda" if available).
    """

    layer: ReplaceableConv
    load_teacher: Callable[[], BaseDetector]
    images_path: Path
    input_cache: Path | None
    preceding_blocks: tuple[Path, ...]
    output_path: Path
    config: BlockwiseConfig
    seed: int
    device: str


@dataclass(frozen=True)
class BlockResult:
    """Result of a task.

    Attributes:
        layer: Name of the replaced convolution.
        seconds: Duration of the task.
        num_steps: Optimizer steps.
        initial_error: Mean squared error on the held-out images before training. All errors are means over the levels.
        error: Mean squared error on the held-out images after training.
        variance: Variance of the target around the means of its channels, mean over the levels.
    """

    layer: str
    seconds: float
    num_steps: int
    initial_error: float
    error: float
    variance: float

    @property
    def residual_ratio(self) -> float | None:
        """Error / variance of the target; None if the target is constant."""
        return self.error / self.variance if self.variance else None


def train_block(task: BlockTask) -> BlockResult:
    """Train a block and write it to its file. An existing file is only read.

    Args:
        task: The task.

    Returns:
        The result of the training.

    Raises:
        DataError: The loss is not finite, or the existing file is not readable.
    """
    if task.output_path.exists():
        return read_block(task.output_path)[1]
    start_time = time.monotonic()
    with _isolated_rng(f"{task.seed} {task.layer.name}"):
        teacher = task.load_teacher().to(_select_worker_device(task.device)).eval().requires_grad_(False)
        images = np.load(task.images_path, mmap_mode="r")
        trainer = _BlockTrainer(teacher, task, images)
        holdout = np.arange(0, len(images), HOLDOUT_STEP)
        initial_error, _ = trainer.measure(holdout)
        num_steps = trainer.train(np.setdiff1d(np.arange(len(images)), holdout))
        error, variance = trainer.measure(holdout)
    result = BlockResult(task.layer.name, time.monotonic() - start_time, num_steps, initial_error, error, variance)
    _write_block(task.output_path, trainer.state_dict(), result)
    return result


def read_block(path: Path) -> tuple[dict[str, Tensor], BlockResult]:
    """Read a trained block.

    Args:
        path: File of `train_block`.

    Returns:
        The weights by their names in the assembled network, and the result of the task.

    Raises:
        DataError: The file is not readable.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content["state_dict"], BlockResult(**content["result"])
    except Exception as error:  # torch.load raises many types
        raise DataError(f"{path}: not a readable block. Delete the file and start again.") from error


class _BlockTrainer:
    """A block and its normalizations, with the teacher's convolution and normalizations that they replace."""

    def __init__(self, teacher: BaseDetector, task: BlockTask, images: NDArray[np.uint8]) -> None:
        modules, layer = dict(teacher.named_modules()), task.layer
        conv = modules[layer.name]
        assert isinstance(conv, nn.Conv2d)
        norms = {name: modules[name] if name else None for name in layer.norms}
        self.task, self.conv = task, conv
        self.block: SeparableConvBlock = make_block(conv).to(conv.weight.device)
        self.teacher_norms = {name: _copy_batch_norm(norm).eval().requires_grad_(False) for name, norm in norms.items()}
        self.block_norms = {name: _copy_batch_norm(norm) for name, norm in norms.items()}
        self.norm_keys = {name: list(norm.state_dict()) for name, norm in norms.items() if norm}
        self.student = nn.ModuleList([self.block, *self.block_norms.values()])
        self.inputs = self.teacher_inputs = LayerInputs(teacher, layer, images, task.input_cache)
        if task.preceding_blocks:
            self.inputs = LayerInputs(_insert_blocks(teacher, task.preceding_blocks), layer, images)

    def train(self, indices: NDArray[np.intp]) -> int:
        """Minimize the mean squared error to the teacher on the images [N]; return the number of steps."""
        config, student, name = self.task.config, self.student.train(), self.task.layer.name
        rng = np.random.default_rng(_hash_to_seed(f"{self.task.seed} {name} order"))
        steps_per_epoch = -(-len(indices) // config.batch)
        optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
        lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps_per_epoch)
        for _ in range(config.epochs):
            order = np.resize(rng.permutation(indices), steps_per_epoch * config.batch)
            for batch_indices in np.split(order, steps_per_epoch):
                pairs = self._compute_outputs(batch_indices)
                loss = torch.stack([nn.functional.mse_loss(output, target) for output, target in pairs]).mean()
                if not torch.isfinite(loss):
                    raise DataError(f"block {name}: the loss is {loss.item()}. Lower distill.blockwise.lr.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                optimizer.step()
                lr_schedule.step()
        return config.epochs * steps_per_epoch

    @torch.no_grad()
    def measure(self, indices: NDArray[np.intp]) -> tuple[float, float]:
        """Return the mean squared error in evaluation mode on the images [N], and the variance of the target."""
        self.student.eval()
        moments = [_ErrorMoments() for _ in self.task.layer.norms]
        for start in range(0, len(indices), self.task.config.batch):
            pairs = self._compute_outputs(indices[start : start + self.task.config.batch])
            for level, (output, target) in zip(moments, pairs, strict=True):
                level.add(output.double(), target.double())
        errors, variances = zip(*(level.compute() for level in moments), strict=True)
        return sum(errors) / len(errors), sum(variances) / len(variances)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of block and normalizations by their names in the assembled network."""
        block = self.block.fuse_norm() if self.task.layer.is_shared else self.block
        weights = {f"{self.task.layer.name}.{name}": value.cpu() for name, value in block.state_dict().items()}
        for name, keys in self.norm_keys.items():
            norm = self.block_norms[name].state_dict()
            weights |= {f"{name}.{key}": norm[key].cpu() for key in keys}
        return weights

    def _compute_outputs(self, indices: NDArray[np.intp]) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of block and teacher behind the normalization, for each call of the convolution."""
        norms, inputs = self.task.layer.norms, self.inputs.get_batch(indices)
        with torch.no_grad():
            is_same = self.inputs is self.teacher_inputs
            teacher_inputs = inputs if is_same else self.teacher_inputs.get_batch(indices)
            targets = [
                self.teacher_norms[name](self.conv(level)) for name, level in zip(norms, teacher_inputs, strict=True)
            ]
        outputs = self.block.forward_levels(inputs)
        outputs = [self.block_norms[name](output) for name, output in zip(norms, outputs, strict=True)]
        return list(zip(outputs, targets, strict=True))


class _ErrorMoments:
    """Sums over batches for the mean squared error and the variance of the target."""

    def __init__(self) -> None:
        self.squared_error, self.sums, self.squares, self.values_per_channel = 0.0, torch.zeros(()), torch.zeros(()), 0

    def add(self, output: Tensor, target: Tensor) -> None:
        """Add a batch of outputs and targets [B, C, H, W]."""
        self.squared_error += float((output - target).square().sum())
        self.sums = self.sums + target.sum((0, 2, 3)).cpu()
        self.squares = self.squares + target.square().sum((0, 2, 3)).cpu()
        self.values_per_channel += target[:, 0].numel()

    def compute(self) -> tuple[float, float]:
        """Return the mean squared error, and the variance of the target around the means of its channels."""
        variance = self.squares / self.values_per_channel - (self.sums / self.values_per_channel).square()
        return self.squared_error / (self.values_per_channel * len(self.sums)), float(variance.mean())


def _insert_blocks(teacher: BaseDetector, paths: Sequence[Path]) -> BaseDetector:
    blocks = [read_block(path) for path in paths]
    return assemble(teacher, {result.layer: state_dict for state_dict, result in blocks})


def _write_block(path: Path, state_dict: dict[str, Tensor], result: BlockResult) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": state_dict, "result": asdict(result)}, buffer)
    with atomic_write(path) as temp_path:
        temp_path.write_bytes(buffer.getbuffer())


def _copy_batch_norm(norm: nn.Module | None) -> nn.Module:
    """Copy a batch normalization, which may be frozen or include an activation, to a plain one. None: identity."""
    if norm is None:
        return nn.Identity()
    source: Any = norm
    batch_norm = nn.BatchNorm2d(len(source.running_mean), eps=source.eps).to(source.running_mean.device)
    batch_norm.load_state_dict(norm.state_dict(), strict=False)  # frozen ones have no num_batches_tracked
    return batch_norm


@contextmanager
def _isolated_rng(name: str) -> Iterator[None]:
    """Seed torch from a name and compute deterministically inside the context; restore both after it."""
    with torch.random.fork_rng(), force_deterministic():
        torch.manual_seed(_hash_to_seed(name))
        yield


def _hash_to_seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _select_worker_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", get_worker_index() % max(1, torch.cuda.device_count()))
    return torch.device(name)
