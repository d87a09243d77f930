"""Which convolutions of a detector can be replaced, what follows them, and what learning them will cost, about.

Assembly: the teacher's network with learnt blocks in the place of its convolutions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.parts import DetectorPart, part_of
from hkd_det.models.surgery import is_dense_conv3x3, make_block


@dataclass(frozen=True)
class ReplaceableConv:
    """A convolution that can be replaced; names as `named_modules` has them.

    norm: the normalisation that alone reads it, by its own statistics; "" if none follows directly.
    input_chw: what enters, of one picture. macs: multiply-accumulates a picture; macs_before: of all convolutions that
    run before it; macs_block: of the block that replaces it.
    """

    name: str
    norm: str
    input_chw: tuple[int, int, int]
    macs: int
    macs_before: int
    macs_block: int

    def estimate_macs(self, is_cached: bool) -> int:
        """Multiply-accumulates a view that learning it takes, about: forward, backward twice that, and the target."""
        return 3 * self.macs_block + self.macs + (0 if is_cached else self.macs_before)


@dataclass
class _ConvTrace:
    """What one pass through a network has shown; convolutions in the order they ran."""

    calls: Counter[str]
    outputs: dict[str, Tensor]
    inputs: dict[str, tuple[int, ...]]
    macs: dict[str, int]
    norm_by_conv: dict[str, str]


def find_replaceable_convs(
    detector: BaseDetector, imgsz_hw: tuple[int, int], parts: Sequence[DetectorPart], min_channels: int
) -> list[ReplaceableConv]:
    """The replaceable convolutions in the order they run; UsageError if there is none.

    Those are 3x3, of one group, with at least `least` channels in and out, in one of the `parts`, and run once a
    picture: a head's convolution shared by all levels stays.
    """
    modules = dict(detector.named_modules())
    trace = _trace_convs(detector, modules, imgsz_hw)
    layers, before = [], 0
    for name, macs in trace.macs.items():
        module = modules[name]
        if trace.calls[name] == 1 and _is_replaceable(module, min_channels) and part_of(detector, name) in parts:
            assert isinstance(module, nn.Conv2d)
            _, channels, height, width = trace.inputs[name]
            layers.append(
                ReplaceableConv(
                    name,
                    trace.norm_by_conv.get(name, ""),
                    (channels, height, width),
                    macs,
                    before,
                    _count_block_macs(module, height, width),
                )
            )
        before += macs * trace.calls[name]
    if not layers:
        raise UsageError(
            f"nothing to replace: {' and '.join(parts)} hold no 3x3 convolution of at least {min_channels} channels that "
            "runs once a picture (distill.blockwise.parts, distill.blockwise.least)"
        )
    return layers


def has_running_stats(module: nn.Module) -> bool:
    """Whether a module is a batch normalisation, frozen or not, whose scale and shift can be set."""
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(getattr(module, name, None) is not None for name in names)


def _is_replaceable(module: nn.Module, min_channels: int) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and is_dense_conv3x3(module)
        and min(module.in_channels, module.out_channels) >= min_channels
    )


def _count_block_macs(convolution: nn.Conv2d, height: int, width: int) -> int:
    block = make_block(convolution)
    outside = height * width // (convolution.stride[0] * convolution.stride[1])
    weights = (block.depthwise1, block.pointwise1, block.depthwise2, block.pointwise2)
    return outside * sum(part.weight.numel() for part in weights)


@torch.no_grad()
def _trace_convs(detector: BaseDetector, modules: dict[str, nn.Module], imgsz_hw: tuple[int, int]) -> _ConvTrace:
    """Run the detector once on an empty picture and look at every convolution and normalisation."""
    trace = _ConvTrace(Counter(), {}, {}, {}, {})

    def ran(name: str) -> Any:
        def look(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            trace.calls[name] += 1
            trace.inputs[name] = tuple(inputs[0].shape)
            trace.macs[name] = module.weight.numel() * output.shape[-2] * output.shape[-1]
            if is_dense_conv3x3(module):
                trace.outputs[name] = output  # kept, so that no other tensor takes its place in memory

        return look

    def normalises(name: str) -> Any:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for source, output in trace.outputs.items():
                if inputs[0] is output:
                    trace.norm_by_conv[source] = name

        return look

    handles = []
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(ran(name)))
        elif has_running_stats(module):
            handles.append(module.register_forward_pre_hook(normalises(name)))
    was_training = detector.training
    try:
        detector.eval()(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
        for handle in handles:
            handle.remove()
    return trace


StateDict = Mapping[str, Tensor]


def assemble(teacher: BaseDetector, blocks: Mapping[str, StateDict]) -> BaseDetector:
    """A new network, in evaluation mode on the teacher's device: the teacher with blocks in place of some layers.

    blocks: by layer, weights by their names in the network; what no block brings is the teacher's.
    """
    changes = replace(teacher.changes, separable=(*teacher.changes.separable, *blocks))
    network = build_from_spec(teacher.spec, changes)
    wanted = network.state_dict()
    state = {name: value for name, value in teacher.state_dict().items() if name in wanted}
    for block in blocks.values():
        state |= block
    network.load_state_dict(state)
    return network.to(next(teacher.parameters()).device).eval()
