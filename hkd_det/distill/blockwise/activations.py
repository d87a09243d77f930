"""What enters a teacher's convolutions: recorded once into files while there is room, else computed anew.

Either way pictures go through one at a time, by one thread, and values are rounded to float16: so that a block learns
the same from a file and without one. In a batch the last bits of a picture's activations would depend on the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hkd_det.distill.blockwise.blocks import ReplaceableConv
from hkd_det.errors import DataError
from hkd_det.files import atomic_write


class _StopForwardError(Exception):
    """The last layer asked for has its input; the rest of the network need not run."""


class LayerInputs:
    """What enters one layer of a frozen network, of any of the views; no larger than its batches in memory."""

    def __init__(
        self, network: nn.Module, layer: str, images: NDArray[np.uint8], cache_path: Path | None = None
    ) -> None:
        self._network, self._layer, self._images = network, layer, images
        self._cache = None if cache_path is None else np.load(cache_path, mmap_mode="r")
        self.device = next(network.parameters()).device

    def get_batch(self, indices: NDArray[np.intp]) -> Tensor:
        """Of the views with these indices: [B, C, H, W] float32."""
        if self._cache is not None:
            return torch.from_numpy(self._cache[indices]).to(self.device).float()
        pictures = torch.from_numpy(self._images[indices]).to(self.device)
        return record_inputs(self._network, [self._layer], pictures)[self._layer].float()


@contextmanager
def force_deterministic() -> Iterator[None]:
    """One thread, and convolutions that give the same bits each time; all as before at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


def record_inputs(network: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What enters the named layers, [B, C, H, W] float16 each, of pictures [B, 3, H, W].

    Raises DataError for activations beyond float16's range.
    """
    with force_deterministic():
        each = [_record_image_inputs(network, layers, picture[None]) for picture in images]
    return {name: torch.cat([inputs[name] for inputs in each]) for name in layers}


@torch.no_grad()
def _record_image_inputs(network: nn.Module, layers: Sequence[str], image: Tensor) -> dict[str, Tensor]:
    """Of one picture; stops after the last layer."""
    inputs: dict[str, Tensor] = {}
    modules = dict(network.named_modules())

    def record(name: str) -> Any:
        def look(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].half()
            if len(inputs) == len(layers):
                raise _StopForwardError

        return look

    handles = [modules[name].register_forward_pre_hook(record(name)) for name in layers]
    try:
        with suppress(_StopForwardError):
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    for name, values in inputs.items():
        if not torch.isfinite(values).all():
            raise DataError(f"the activations before {name} are beyond float16 or not finite")
    return inputs


def select_cached_layers(
    layers: Sequence[ReplaceableConv], num_images: int, capacity_bytes: int
) -> list[ReplaceableConv]:
    """The layers whose inputs are kept in `room_bytes`: the smallest first, which are also the deepest, about."""
    kept, room = [], capacity_bytes
    for layer in sorted(layers, key=lambda layer: (count_input_bytes(layer, num_images), layer.name)):
        room -= count_input_bytes(layer, num_images)
        if room < 0:
            break
        kept.append(layer)
    return kept


def count_input_bytes(layer: ReplaceableConv, num_images: int) -> int:
    """Room that a layer's inputs take in float16."""
    channels, height, width = layer.input_chw
    return 2 * num_images * channels * height * width


def write_inputs(
    teacher: nn.Module, layers: Sequence[ReplaceableConv], images: NDArray[np.uint8], folder: Path, batch: int
) -> None:
    """Run the teacher once over all views and write what enters each layer: `folder`/NAME.npy, [views, C, H, W].

    Files that are there stay.
    """
    missing = [layer for layer in layers if not input_cache_path(folder, layer.name).exists()]
    if not missing:
        return
    device = next(teacher.parameters()).device
    with ExitStack() as stack:
        shapes = {layer.name: (len(images), *layer.input_chw) for layer in missing}
        files = {
            name: stack.enter_context(create_npy(input_cache_path(folder, name), shape, np.float16))
            for name, shape in shapes.items()
        }
        for start in range(0, len(images), batch):
            pictures = torch.from_numpy(np.array(images[start : start + batch])).to(device)
            for name, values in record_inputs(teacher, list(files), pictures).items():
                files[name][start : start + len(values)] = values.cpu().numpy()


def input_cache_path(folder: Path, name: str) -> Path:
    """Where a layer's inputs lie."""
    return folder / f"{name}.npy"


@contextmanager
def create_npy(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """An array in a .npy file, written through memory mapping; the file appears once it is whole."""
    with atomic_write(path) as aside:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()
