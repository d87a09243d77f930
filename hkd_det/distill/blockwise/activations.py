"""Input activations of a teacher's convolutions: cached in files as far as they fit, else computed on each use.

In both cases the images pass the network one at a time in one thread, and the values are rounded to float16. A block
therefore trains on the same values with and without the cache. In a batch the last bits of an image's activations
depend on the other images.
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
from hkd_det.ops.hooks import observe_calls


class LayerInputs:
    """The inputs of one layer of a frozen network for a set of images, loaded per batch.

    Args:
        network: The network, in evaluation mode.
        layer: Name of the layer.
        images: uint8 [N, 3, H, W], usually memory-mapped.
        cache_path: File of `write_inputs` with the inputs, or None to compute them.
    """

    def __init__(
        self, network: nn.Module, layer: str, images: NDArray[np.uint8], cache_path: Path | None = None
    ) -> None:
        self._network, self._layer, self._images = network, layer, images
        self._cache = None if cache_path is None else np.load(cache_path, mmap_mode="r")
        self.device = next(network.parameters()).device

    def get_batch(self, indices: NDArray[np.intp]) -> Tensor:
        """Return the inputs for some images.

        Args:
            indices: int [B], indices of the images.

        Returns:
            Tensor[B, C, H, W] on the network's device, rounded to float16 precision.
        """
        if self._cache is not None:
            return torch.from_numpy(self._cache[indices]).to(self.device).float()
        images = torch.from_numpy(self._images[indices]).to(self.device)
        return record_inputs(self._network, [self._layer], images)[self._layer].float()


@contextmanager
def force_deterministic() -> Iterator[None]:
    """Use one CPU thread and deterministic cuDNN algorithms inside the context, and restore the settings after it.

    Yields:
        Nothing.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(num_threads)


def record_inputs(network: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Run images through a network, one at a time, and record the inputs of some layers.

    Args:
        network: The network, in evaluation mode.
        layers: Names of the layers.
        images (uint8 Tensor[B, 3, H, W]): Images on the network's device.

    Returns:
        By layer name, half Tensor[B, C, H, W].

    Raises:
        DataError: An activation is outside the range of float16 or not finite.
    """
    with force_deterministic():
        inputs_per_image = [_record_image_inputs(network, layers, image[None]) for image in images]
    return {name: torch.cat([inputs[name] for inputs in inputs_per_image]) for name in layers}


def select_cached_layers(
    layers: Sequence[ReplaceableConv], num_images: int, capacity_bytes: int
) -> list[ReplaceableConv]:
    """Select the layers whose inputs are cached: the smallest first. Those are mostly the deepest layers.

    Args:
        layers: Candidates.
        num_images: Number of images.
        capacity_bytes: Size limit of the cache.

    Returns:
        The selected layers, smallest inputs first.
    """
    selected, free_bytes = [], capacity_bytes
    for layer in sorted(layers, key=lambda layer: (count_input_bytes(layer, num_images), layer.name)):
        free_bytes -= count_input_bytes(layer, num_images)
        if free_bytes < 0:
            break
        selected.append(layer)
    return selected


def count_input_bytes(layer: ReplaceableConv, num_images: int) -> int:
    """Return the size of a layer's inputs in float16, bytes.

    Args:
        layer: The layer.
        num_images: Number of images.
    """
    channels, height, width = layer.input_chw
    return 2 * num_images * channels * height * width


def write_inputs(
    teacher: nn.Module, layers: Sequence[ReplaceableConv], images: NDArray[np.uint8], folder: Path, batch: int
) -> None:
    """Run the teacher once over all images and write the inputs of layers to files. Existing files are kept.

    Args:
        teacher: The teacher, in evaluation mode.
        layers: Layers to record.
        images: uint8 [N, 3, H, W].
        folder: Directory of the files, see `get_input_cache_path`; each contains float16 [N, C, H, W].
        batch: Images that are loaded at once.
    """
    missing = [layer for layer in layers if not get_input_cache_path(folder, layer.name).exists()]
    if not missing:
        return
    device = next(teacher.parameters()).device
    with ExitStack() as stack:
        shapes = {layer.name: (len(images), *layer.input_chw) for layer in missing}
        arrays = {
            name: stack.enter_context(create_npy(get_input_cache_path(folder, name), shape, np.float16))
            for name, shape in shapes.items()
        }
        for start in range(0, len(images), batch):
            image_batch = torch.from_numpy(np.array(images[start : start + batch])).to(device)
            for name, values in record_inputs(teacher, list(arrays), image_batch).items():
                arrays[name][start : start + len(values)] = values.cpu().numpy()


def get_input_cache_path(folder: Path, name: str) -> Path:
    """Return the cache file of a layer's inputs.

    Args:
        folder: Directory of the cache.
        name: Name of the layer.
    """
    return folder / f"{name}.npy"


@contextmanager
def create_npy(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """Create a .npy file through memory mapping. The file appears at `path` when the context ends without an error.

    Args:
        path: The file.
        shape: Shape of the array.
        dtype: Data type of the array.

    Yields:
        The writable array.
    """
    with atomic_write(path) as temp_path:
        array = np.lib.format.open_memmap(temp_path, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()


class _StopForwardError(Exception):
    """Ends a forward pass after the last recorded layer."""


@torch.no_grad()
def _record_image_inputs(network: nn.Module, layers: Sequence[str], image: Tensor) -> dict[str, Tensor]:
    """Record the inputs of layers for one image [1, 3, H, W]; stop the forward pass at the last layer."""
    inputs: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].half()
        if len(inputs) == len(layers):
            raise _StopForwardError

    with suppress(_StopForwardError), observe_calls(network, layers, on_input=record):
        network(image)
    for name, values in inputs.items():
        if not torch.isfinite(values).all():
            raise DataError(
                f"{name}: input activations are not finite or outside the range of float16. "
                "Use a teacher with smaller activations."
            )
    return inputs
