"""Ledger: what a detector costs at given widths of its inner layers, without building it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.base import BaseDetector
from hkd_det.models.surgery import PrunableLayer
from hkd_det.models.zoo import ModelComplexity, count_params_and_flops


@dataclass(frozen=True)
class _ConvCost:
    """A convolution whose channels vary: indices of the layers that are its input and its output, None where fixed."""

    input_layer: int | None
    output_layer: int | None
    in_channels: int
    out_channels: int
    kernel_area: int  # weights of a pair of channels
    num_positions: int  # cells it is applied to in a picture
    params_per_channel: int  # of bias and normalisations, an output channel

    def count_params_and_flops(self, widths: Sequence[int]) -> tuple[int, int]:
        """Parameters and operations."""
        channels_in = self.in_channels if self.input_layer is None else widths[self.input_layer]
        channels_out = self.out_channels if self.output_layer is None else widths[self.output_layer]
        weights = channels_in * channels_out * self.kernel_area
        return weights + channels_out * self.params_per_channel, 2 * weights * self.num_positions


class ChannelCostModel:
    """Exact to the number: `cost(widths)` equals `models.sizes.cost` of the network with these widths."""

    def __init__(self, detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]) -> None:
        """Of a detector without compactors; widths come in the order of `layers`."""
        modules = dict(detector.named_modules())
        positions = _count_positions(detector, imgsz_hw)
        gives = {layer.conv: index for index, layer in enumerate(layers)}
        reads = {name: index for index, layer in enumerate(layers) for name in layer.consumers}
        norms = {layer.conv: layer.norms for layer in layers}
        self._convs = []
        # What does not run when deployed, such as a head that only training reads, costs nothing.
        for name in [name for name in gives | reads if positions[name]]:
            module = modules[name]
            assert isinstance(module, nn.Conv2d)
            numbers = (module.bias is not None) + sum(
                len(list(modules[norm].parameters(recurse=False))) for norm in norms.get(name, ())
            )
            self._convs.append(
                _ConvCost(
                    reads.get(name),
                    gives.get(name),
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0] * module.kernel_size[1],
                    positions[name],
                    numbers,
                )
            )
        self.widths = [int(modules[layer.conv].out_channels) for layer in layers]
        self.initial_complexity = count_params_and_flops(detector, imgsz_hw)
        parameters, flops = self._sum_convs(self.widths)
        self._fixed = self.initial_complexity.num_params - parameters, self.initial_complexity.flops - flops

    def compute_complexity(self, widths: Sequence[int]) -> ModelComplexity:
        """Of the network with these widths."""
        parameters, flops = self._sum_convs(widths)
        return ModelComplexity(self._fixed[0] + parameters, self._fixed[1] + flops, self.initial_complexity.imgsz_hw)

    def _sum_convs(self, widths: Sequence[int]) -> tuple[int, int]:
        parameters, flops = zip(*(entry.count_params_and_flops(widths) for entry in self._convs), strict=True)
        return sum(parameters), sum(flops)


def filter_deployed_layers(
    detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]
) -> list[PrunableLayer]:
    """Those of the layers that run when the detector is deployed."""
    positions = _count_positions(detector, imgsz_hw)
    return [layer for layer in layers if positions[layer.conv]]


@torch.no_grad()
def _count_positions(detector: BaseDetector, imgsz_hw: tuple[int, int]) -> Counter[str]:
    """Cells that each convolution is applied to in one picture, over all levels, when it is deployed."""
    counts: Counter[str] = Counter()
    handles = []
    for name, module in detector.named_modules():
        if isinstance(module, nn.Conv2d):

            def look(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                counts[name] += output.shape[-2] * output.shape[-1]

            handles.append(module.register_forward_hook(look))
    was_training = detector.training
    try:
        detector.eval().predict(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
        for handle in handles:
            handle.remove()
    return counts
