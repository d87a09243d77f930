"""Replaceable convolutions of a detector, their inputs, and the network that contains the trained blocks.

The images pass the network one at a time in one thread, and the inputs of a convolution are rounded to float16. A block
therefore trains on the same values with and without the cache in files. In a batch the last bits of an image's
activations depend on the other images.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models.base import BaseDetector, DetectorPart
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.surgery import is_dense_conv3x3, make_block

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class ReplaceableConv:
    """A convolution that a depthwise-separable block can replace. Names are those of `named_modules`.

    Attributes:
        name: Name of the convolution.
        norm: Name of the batch normalization that directly follows it; "" if there is none.
        input_chw: Channels, height and width of the input for one image.
        macs: Multiply-accumulates (MACs) of the convolution per image.
        macs_before: MACs per image of all convolutions that run before it.
        macs_block: MACs per image of the replacing block.
    """

    name: str
    norm: str
    input_chw: tuple[int, int, int]
    macs: int
    macs_before: int
    macs_block: int

    def estimate_macs(self, is_cached: bool) -> int:
        """Estimate the MACs of one training step per image: forward, twice that for backward, and the target.

        Args:
            is_cached: Whether the inputs are read from a file instead of computed.

        Returns:
            Multiply-accumulates per image.
        """
        return 3 * self.macs_block + self.macs + (0 if is_cached else self.macs_before)


def find_replaceable_convs(
    detector: BaseDetector, imgsz_hw: tuple[int, int], parts: Sequence[DetectorPart], min_channels: int
) -> list[ReplaceableConv]:
    """Find the replaceable convolutions: 3x3, one group, and called once per image.

    A convolution of a head that all levels share is called several times, and is not replaceable.

    Args:
        detector: The detector.
        imgsz_hw: Input height and width, pixels.
        parts: Parts of the detector to search.
        min_channels: Minimum number of input channels and of output channels.

    Returns:
        The convolutions in the order of the forward pass.

    Raises:
        UsageError: There is no such convolution.
    """
    modules = dict(detector.named_modules())
    trace = _trace_convs(detector, modules, imgsz_hw)
    layers, macs_before = [], 0
    for name, macs in trace.macs.items():
        module = modules[name]
        if trace.calls[name] == 1 and _is_replaceable(module, min_channels) and detector.part_of(name) in parts:
            assert isinstance(module, nn.Conv2d)
            _, channels, height, width = trace.input_shapes[name]
            layers.append(
                ReplaceableConv(
                    name,
                    trace.norm_by_conv.get(name, ""),
                    (channels, height, width),
                    macs,
                    macs_before,
                    _count_block_macs(module, height, width),
                )
            )
        macs_before += macs * trace.calls[name]
    if not layers:
        raise UsageError(
            f"distill.blockwise.parts={','.join(parts)}: no 3x3 convolution with at least {min_channels} channels that "
            "runs once per image. Set other parts or a smaller distill.blockwise.min_channels."
        )
    return layers


def has_running_stats(module: nn.Module) -> bool:
    """Return whether a module is a batch normalization, frozen or not, with scale and shift.

    Args:
        module: Any module.
    """
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(getattr(module, name, None) is not None for name in names)


def assemble(teacher: BaseDetector, blocks: Mapping[str, StateDict]) -> BaseDetector:
    """Build the teacher's network with trained blocks in place of some convolutions.

    Args:
        teacher: The teacher.
        blocks: By convolution name, the weights of block and normalization by their names in the network. All other
            weights are those of the teacher.

    Returns:
        A new network in evaluation mode on the teacher's device.
    """
    changes = replace(teacher.changes, separable=(*teacher.changes.separable, *blocks))
    network = build_from_spec(teacher.spec, changes)
    keys = network.state_dict().keys()
    state_dict = {name: value for name, value in teacher.state_dict().items() if name in keys}
    for block in blocks.values():
        state_dict |= block
    network.load_state_dict(state_dict)
    return network.to(next(teacher.parameters()).device).eval()


@dataclass
class _ConvTrace:
    """Record of one forward pass. Convolutions are in the order of the forward pass.

    Attributes:
        calls: Calls per convolution.
        outputs: Outputs of 3x3 convolutions.
        input_shapes: Input shapes of convolutions.
        macs: Multiply-accumulates of one call per convolution.
        norm_by_conv: Name of the normalization that reads the output of a convolution.
    """

    calls: Counter[str]
    outputs: dict[str, Tensor]
    input_shapes: dict[str, tuple[int, ...]]
    macs: dict[str, int]
    norm_by_conv: dict[str, str]


def _is_replaceable(module: nn.Module, min_channels: int) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and is_dense_conv3x3(module)
        and min(module.in_channels, module.out_channels) >= min_channels
    )


def _count_block_macs(conv: nn.Conv2d, height: int, width: int) -> int:
    block = make_block(conv)
    num_positions = height * width // (conv.stride[0] * conv.stride[1])
    layers = (block.depthwise1, block.pointwise1, block.depthwise2, block.pointwise2)
    return num_positions * sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def _trace_convs(detector: BaseDetector, modules: dict[str, nn.Module], imgsz_hw: tuple[int, int]) -> _ConvTrace:
    """Run the detector once on a black image and record every convolution and normalization."""
    trace = _ConvTrace(Counter(), {}, {}, {}, {})

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            trace.calls[name] += 1
            trace.input_shapes[name] = tuple(inputs[0].shape)
            trace.macs[name] = module.weight.numel() * output.shape[-2] * output.shape[-1]
            if is_dense_conv3x3(module):
                trace.outputs[name] = output  # A reference keeps the memory from being reused.
        else:
            trace.norm_by_conv |= {conv: name for conv, value in trace.outputs.items() if inputs[0] is value}

    names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) or has_running_stats(module)]
    was_training = detector.training
    try:
        with observe_calls(detector, names, on_output=record):
            detector.eval()(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
    return trace


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
