"""Single-process and distributed training (torchrun): process rank, device and collective operations."""

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
    """The rank and device of this process, with the collective operations that training uses.

    Attributes:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        device: Device that this process trains on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def reduce_mean(self, total: Tensor) -> Tensor:
        """Sum a normalization term over all processes, clamp it to at least 1, and divide by the world size.

        Gradients are averaged over processes. A loss that is divided by the returned value is therefore divided by the
        global sum.

        Args:
            total (Tensor): The term of this process, any shape.

        Returns:
            Tensor of the same shape, without gradient.
        """
        global_total = total.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(global_total)
        return global_total.clamp(min=1.0) / self.world_size

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors in place by their means over all processes, in one all-reduce.

        Args:
            tensors: Tensors of the same dtype and device, with the same shapes in all processes.
        """
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = torch.split(flat / self.world_size, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def all_gather(self, value: T) -> list[T]:
        """Collect one picklable value from every process.

        Args:
            value: The value of this process. Tensors inside it may be on any device.

        Returns:
            The values ordered by rank. Tensors stay on the device of the process that passed them.
        """
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group of torchrun, if there is one, for the time of the context.

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N".

    Yields:
        The context of this process; world size 1 without torchrun.

    Raises:
        UsageError: `device` is not a device name.
        UnavailableError: The CUDA device does not exist.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch_device = resolve_device(device)
    if world_size == 1:
        yield DistributedContext(0, 1, torch_device)
        return
    shared_store = next(iter(rendezvous("env://")))[0]
    # torchrun's store keeps the addresses of earlier process groups. A unique prefix prevents that they are reused.
    group_name = f"group {shared_store.add(f'number of groups of rank {rank}', 1)}"
    store = dist.PrefixStore(group_name, shared_store)  # type: ignore[attr-defined]  # missing in the stubs
    backend = "nccl" if torch_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield DistributedContext(rank, world_size, torch_device)
        dist.barrier()  # keep the group alive until every process has finished communicating
    finally:
        dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """Return the device of this process and make it the current CUDA device.

    Args:
        name: "auto" (CUDA if available), "cpu", "cuda" (index `LOCAL_RANK`) or "cuda:N".

    Returns:
        The device; a CUDA device has an index.

    Raises:
        UsageError: `name` is not a device name.
        UnavailableError: The CUDA device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError(f"--device {name}: torch finds no CUDA device. Train with --device cpu.")
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        )
        num_devices = torch.cuda.device_count()
        if device.index >= num_devices:
            raise UnavailableError(
                f"--device {name}: CUDA device {device.index} does not exist. Use cuda:0 to cuda:{num_devices - 1}."
            )
        torch.cuda.set_device(device)
    return device
