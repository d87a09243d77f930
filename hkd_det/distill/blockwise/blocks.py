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
        norms: For each call per image, the name of the batch normalization that directly follows it; "" if there is
            none. A convolution of a shared head is called once per level, usually with one normalization per level.
        input_shapes: For each call, channels, height and width of the input.
        macs: Multiply-accumulates (MACs) of the convolution per image, all calls.
        macs_before: MACs per image of all convolutions whose first call is before.
        macs_block: MACs per image of the replacing block.
    """

    name: str
    norms: tuple[str, ...]
    input_shapes: tuple[tuple[int, int, int], ...]
    macs: int
    macs_before: int
    macs_block: int

    @property
    def is_shared(self) -> bool:
        """Whether the convolution is called several times per image."""
        return len(self.norms) > 1

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Channels of the inputs, and the sum of the positions of all calls."""
        return self.input_shapes[0][0], sum(height * width for _, height, width in self.input_shapes)

    def split_calls(self, inputs: Tensor) -> list[Tensor]:
        """Split inputs [B, C, P] over all positions into those of each call, [B, C, H, W]."""
        sizes = [height * width for _, height, width in self.input_shapes]
        return [
            part.reshape(*part.shape[:2], *shape[1:])
            for part, shape in zip(torch.split(inputs, sizes, 2), self.input_shapes, strict=True)
        ]

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
    """Find the replaceable convolutions: 3x3 with one group.

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
    layers, macs_before = [], 0
    for name, calls in _trace_convs(detector, modules, imgsz_hw).items():
        module, macs = modules[name], sum(call.macs for call in calls)
        if _is_replaceable(module, min_channels) and detector.part_of(name) in parts:
            assert isinstance(module, nn.Conv2d)
            layers.append(
                ReplaceableConv(
                    name,
                    tuple(call.norm for call in calls),
                    tuple(call.input_chw for call in calls),
                    macs,
                    macs_before,
                    sum(_count_block_macs(module, call.input_chw) for call in calls),
                )
            )
        macs_before += macs
    if not layers:
        raise UsageError(
            f"distill.blockwise.parts={','.join(parts)}: no 3x3 convolution with at least {min_channels} channels. "
            "Set other parts or a smaller distill.blockwise.min_channels."
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
        blocks: By convolution name, the weights of block and normalizations by their names in the network. All other
            weights are those of the teacher. A block that several levels share has a bias in its first pointwise layer.

    Returns:
        A new network in evaluation mode on the teacher's device.
    """
    shared = [name for name, block in blocks.items() if f"{name}.pointwise1.bias" in block]
    changes = replace(
        teacher.changes,
        separable=(*teacher.changes.separable, *blocks),
        separable_shared=(*teacher.changes.separable_shared, *shared),
    )
    network = build_from_spec(teacher.spec, changes)
    keys = network.state_dict().keys()
    state_dict = {name: value for name, value in teacher.state_dict().items() if name in keys}
    for block in blocks.values():
        state_dict |= block
    network.load_state_dict(state_dict)
    return network.to(next(teacher.parameters()).device).eval()


@dataclass
class _ConvCall:
    """One call of a convolution in a forward pass.

    Attributes:
        input_chw: Channels, height and width of the input.
        macs: Multiply-accumulates of the call.
        output: Output of a 3x3 convolution, else None.
        norm: Name of the normalization that reads the output; "" if there is none.
    """

    input_chw: tuple[int, int, int]
    macs: int
    output: Tensor | None
    norm: str = ""


def _is_replaceable(module: nn.Module, min_channels: int) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and is_dense_conv3x3(module)
        and min(module.in_channels, module.out_channels) >= min_channels
    )


def _count_block_macs(conv: nn.Conv2d, input_chw: tuple[int, int, int]) -> int:
    block, (_, height, width) = make_block(conv), input_chw
    num_positions = -(-height // conv.stride[0]) * -(-width // conv.stride[1])
    layers = (block.depthwise1, block.pointwise1, block.depthwise2, block.pointwise2)
    return num_positions * sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def _trace_convs(
    detector: BaseDetector, modules: dict[str, nn.Module], imgsz_hw: tuple[int, int]
) -> dict[str, list[_ConvCall]]:
    """Run the detector once on a black image; return the calls of every convolution, in the order of the first call."""
    calls: dict[str, list[_ConvCall]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs = module.weight.numel() * output.shape[-2] * output.shape[-1]
            _, channels, height, width = inputs[0].shape
            # A reference to the output keeps its memory from being reused.
            call = _ConvCall((channels, height, width), macs, output if is_dense_conv3x3(module) else None)
            calls.setdefault(name, []).append(call)
        else:
            for call in (call for conv_calls in calls.values() for call in conv_calls):
                if call.output is inputs[0]:
                    call.norm = name

    names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) or has_running_stats(module)]
    was_training = detector.training
    try:
        with observe_calls(detector, names, on_output=record):
            detector.eval()(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
    return calls


class LayerInputs:
    """The inputs of one layer of a frozen network for a set of images, loaded per batch.

    Args:
        network: The network, in evaluation mode.
        layer: The layer.
        images: uint8 [N, 3, H, W], usually memory-mapped.
        cache_path: File of `write_inputs` with the inputs, or None to compute them.
    """

    def __init__(
        self, network: nn.Module, layer: ReplaceableConv, images: NDArray[np.uint8], cache_path: Path | None = None
    ) -> None:
        self._network, self._layer, self._images = network, layer, images
        self._cache = None if cache_path is None else np.load(cache_path, mmap_mode="r")
        self.device = next(network.parameters()).device

    def get_batch(self, indices: NDArray[np.intp]) -> list[Tensor]:
        """Return the inputs for some images.

        Args:
            indices: int [B], indices of the images.

        Returns:
            For each call, Tensor[B, C, H, W] on the network's device, rounded to float16 precision.
        """
        if self._cache is not None:
            inputs = torch.from_numpy(self._cache[indices]).to(self.device)
        else:
            images = torch.from_numpy(self._images[indices]).to(self.device)
            inputs = record_inputs(self._network, [self._layer], images)[self._layer.name]
        return self._layer.split_calls(inputs.float())


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


def record_inputs(network: nn.Module, layers: Sequence[ReplaceableConv], images: Tensor) -> dict[str, Tensor]:
    """Run images through a network, one at a time, and record the inputs of some layers.

    Args:
        network: The network, in evaluation mode.
        layers: The layers.
        images (uint8 Tensor[B, 3, H, W]): Images on the network's device.

    Returns:
        By layer name, half Tensor[B, C, P] with the positions of all calls, see `ReplaceableConv.split_calls`.

    Raises:
        DataError: An activation is outside the range of float16 or not finite.
    """
    with force_deterministic():
        inputs_per_image = [_record_image_inputs(network, layers, image[None]) for image in images]
    return {layer.name: torch.cat([inputs[layer.name] for inputs in inputs_per_image]) for layer in layers}


class _StopForwardError(Exception):
    """Ends a forward pass after the last recorded call."""


@torch.no_grad()
def _record_image_inputs(network: nn.Module, layers: Sequence[ReplaceableConv], image: Tensor) -> dict[str, Tensor]:
    """Record the inputs [1, C, P] of layers for one image [1, 3, H, W]; stop the forward pass at the last call."""
    calls: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    remaining = Counter({layer.name: len(layer.input_shapes) for layer in layers})

    def record(name: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        calls[name].append(arguments[0].half().flatten(2))
        remaining[name] -= 1
        if not any(remaining.values()):
            raise _StopForwardError

    with suppress(_StopForwardError), observe_calls(network, list(calls), on_input=record):
        network(image)
    inputs = {name: torch.cat(values, 2) for name, values in calls.items()}
    for name, values in inputs.items():
        if not torch.isfinite(values).all():
            raise DataError(
                f"{name}: input activations are not finite or outside the range of float16. "
                "Use a teacher with smaller activations."
            )
    return inputs
