"""The processes of one training run: alone, or several started by torchrun."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hkd_det.errors import UnavailableError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among `count`, and the device it trains on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def reduce_mean(self, total: Tensor) -> Tensor:
        """The sum over all processes' pictures, at least 1, divided by the number of processes.

        Gradients are averaged over processes, so a loss divided by this is divided by the global sum.
        """
        whole = total.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(whole)
        return whole.clamp(min=1.0) / self.world_size

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each, in place, by its mean over all processes, in one exchange; alone they stay as they are."""
        if self.world_size == 1 or not tensors:
            return
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole)
        parts = torch.split(whole / self.world_size, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, value: T) -> list[T]:
        """What each process gave here, in the order of ranks; tensors may lie on the device of whoever gave them."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
    Raises UnavailableError for a CUDA device that is not there.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = resolve_device(device)
    if count == 1:
        yield DistributedContext(0, 1, chosen)
        return
    shared = next(iter(rendezvous("env://")))[0]
    # Under a name of its own: torchrun keeps what an earlier group wrote, addresses nobody listens at any more.
    name = f"group {shared.add(f'groups that {rank} has joined', 1)}"
    store = dist.PrefixStore(name, shared)  # type: ignore[attr-defined]
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield DistributedContext(rank, count, chosen)
        dist.barrier()  # nobody leaves while another still speaks
    finally:
        dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """This process's device by name, as `joined_processes` has it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError(f"--device {name}: torch sees no CUDA device here; train with --device cpu")
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        )
        if device.index >= torch.cuda.device_count():
            raise UnavailableError(
                f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, 0 is the first"
            )
        torch.cuda.set_device(device)
    return device
