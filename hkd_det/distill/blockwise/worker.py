"""One task: learn the block that replaces one convolution, from what enters and leaves it in the teacher.

The target is taken after the normalisation that follows the convolution and before the activation. Before the
normalisation, channels of large variance would count most although the network scales them away; after the
activation, a block would not learn where values are negative. The block learns with a normalisation of its own in that
place; its statistics, scale and shift replace the teacher's, so nothing is normalised twice.

Chance comes from the run's seed and the layer's name, arithmetic runs on one thread: a block comes out the same
wherever and whenever its task runs.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hkd_det.distill.blockwise.activations import LayerInputs, deterministic
from hkd_det.distill.blockwise.blocks import assemble
from hkd_det.distill.blockwise.config import BlockwiseConfig
from hkd_det.distill.blockwise.executor import get_worker_index
from hkd_det.errors import DataError
from hkd_det.files import atomic_write
from hkd_det.models.base import BaseDetector
from hkd_det.models.surgery import SeparableConvBlock, make_block

HOLDOUT_STEP = 8  # one in so many views is measured with, not learnt from


@dataclass(frozen=True)
class BlockTask:
    """A block to learn, in any process that sees the run's folder.

    layer, norm: of the teacher. open_teacher: gives the teacher. views: .npy, [N, 3, H, W] uint8. cached: what enters
    the layer in the teacher, .npy; None if it is to be computed. before: finished blocks that are in their place in
    the network whose activations this one learns from. block: the file to write. device: "cpu", "cuda" (this
    machine's workers take its CUDA devices in turn), "cuda:1", or "auto": "cuda" where there is one.
    """

    layer: str
    norm: str
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
    """How a task went.

    error_before, error: mean squared, on views held out, before and after learning. variance: of the target, around
    its channels' means.
    """

    layer: str
    seconds: float
    num_steps: int
    initial_error: float
    error: float
    variance: float

    @property
    def residual_ratio(self) -> float | None:
        """The share of the target's variance that the block leaves unexplained; None of a target that never varies."""
        return self.error / self.variance if self.variance else None


def train_block(task: BlockTask) -> BlockResult:
    """Learn the block and write it; one that was written before is read only.

    Raises DataError if the loss is not finite.
    """
    if task.output_path.exists():
        return read_block(task.output_path)[1]
    started = time.monotonic()
    with _isolated_rng(f"{task.seed} {task.layer}"):
        teacher = task.load_teacher().to(_select_worker_device(task.device)).eval().requires_grad_(False)
        views = np.load(task.images_path, mmap_mode="r")
        pupil = _BlockTrainer(teacher, task, views)
        held = np.arange(0, len(views), HOLDOUT_STEP)
        before, _ = pupil.measure(held)
        steps = pupil.train(np.setdiff1d(np.arange(len(views)), held))
        error, variance = pupil.measure(held)
    learnt = BlockResult(task.layer, time.monotonic() - started, steps, before, error, variance)
    _write_block(task.output_path, pupil.state_dict(), learnt)
    return learnt


class _BlockTrainer:
    """A block, the normalisation behind it, and the teacher's convolution and normalisation that they replace."""

    def __init__(self, teacher: BaseDetector, task: BlockTask, images: NDArray[np.uint8]) -> None:
        modules = dict(teacher.named_modules())
        convolution = modules[task.layer]
        assert isinstance(convolution, nn.Conv2d)
        norm = modules[task.norm] if task.norm else None
        self.task, self.convolution = task, convolution
        self.block: SeparableConvBlock = make_block(convolution).to(convolution.weight.device)
        self.teacher_norm = _copy_batch_norm(norm).eval().requires_grad_(False)
        self.block_norm = _copy_batch_norm(norm)
        self.norm_keys = list(norm.state_dict()) if norm else []
        self.inputs = self.teacher_inputs = LayerInputs(teacher, task.layer, images, task.input_cache)
        if task.preceding_blocks:
            self.inputs = LayerInputs(_insert_blocks(teacher, task.preceding_blocks), task.layer, images)

    def train(self, indices: NDArray[np.intp]) -> int:
        """Minimise the mean squared error to the teacher; returns the number of steps."""
        settings, learner = self.task.config, nn.Sequential(self.block, self.block_norm).train()
        chance = np.random.default_rng(_hash_to_seed(f"{self.task.seed} {self.task.layer} order"))
        per_epoch = -(-len(indices) // settings.batch)
        optimizer = torch.optim.Adam(learner.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * per_epoch)
        for _ in range(settings.epochs):
            order = np.resize(chance.permutation(indices), per_epoch * settings.batch)
            for part in np.split(order, per_epoch):
                entered, target = self._load_batch(part)
                loss = nn.functional.mse_loss(learner(entered), target)
                if not torch.isfinite(loss):
                    raise DataError(f"block {self.task.layer}: the loss is {loss.item()}; lower distill.blockwise.lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return settings.epochs * per_epoch

    @torch.no_grad()
    def measure(self, indices: NDArray[np.intp]) -> tuple[float, float]:
        """Mean squared error in evaluation mode over the views, and the variance of the target."""
        learner, batch = nn.Sequential(self.block, self.block_norm).eval(), self.task.config.batch
        error, sums, squares, values = 0.0, torch.zeros(()), torch.zeros(()), 0
        for start in range(0, len(indices), batch):
            entered, target = self._load_batch(indices[start : start + batch])
            target = target.double()
            error += float((learner(entered).double() - target).square().sum())
            sums = sums + target.sum((0, 2, 3)).cpu()
            squares = squares + target.square().sum((0, 2, 3)).cpu()
            values += target[:, 0].numel()
        variance = squares / values - (sums / values).square()
        return error / (values * len(sums)), float(variance.mean())

    def state_dict(self) -> dict[str, Tensor]:
        """The block's and its normalisation's, by the names they have in the network where they take their place."""
        block = {f"{self.task.layer}.{name}": value.cpu() for name, value in self.block.state_dict().items()}
        norm = self.block_norm.state_dict()
        return block | {f"{self.task.norm}.{name}": norm[name].cpu() for name in self.norm_keys}

    @torch.no_grad()
    def _load_batch(self, indices: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """What enters the block, and what the teacher makes of the same views there."""
        entered = self.inputs.get_batch(indices)
        at_teacher = entered if self.inputs is self.teacher_inputs else self.teacher_inputs.get_batch(indices)
        return entered, self.teacher_norm(self.convolution(at_teacher))


def read_block(path: Path) -> tuple[dict[str, Tensor], BlockResult]:
    """A learnt block's weights and how its task went; DataError if the file is broken."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content["weights"], BlockResult(**content["learnt"])
    except Exception as error:  # torch raises many kinds
        raise DataError(f"{path}: not a readable block ({type(error).__name__}); delete it and start again") from error


def _insert_blocks(teacher: BaseDetector, paths: Sequence[Path]) -> BaseDetector:
    finished = [read_block(path) for path in paths]
    return assemble(teacher, {learnt.layer: weights for weights, learnt in finished})


def _write_block(path: Path, state_dict: dict[str, Tensor], result: BlockResult) -> None:
    buffer = io.BytesIO()
    torch.save({"weights": state_dict, "learnt": asdict(result)}, buffer)
    with atomic_write(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def _copy_batch_norm(norm: nn.Module | None) -> nn.Module:
    """A batch normalisation with the values of another, which may be frozen or end in an activation; or nothing."""
    if norm is None:
        return nn.Identity()
    values: Any = norm
    plain = nn.BatchNorm2d(len(values.running_mean), eps=values.eps).to(values.running_mean.device)
    plain.load_state_dict(norm.state_dict(), strict=False)  # a frozen one counts no batches
    return plain


@contextmanager
def _isolated_rng(name: str) -> Iterator[None]:
    """Chance from the name alone, repeatable arithmetic; all as before at the end."""
    with torch.random.fork_rng(), deterministic():
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
