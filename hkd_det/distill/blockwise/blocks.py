"""Replaceable convolutions of a detector, their training cost, and the network that contains the trained blocks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DetectorPart
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.surgery import is_dense_conv3x3, make_block
from hkd_det.ops.hooks import observe_calls

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
