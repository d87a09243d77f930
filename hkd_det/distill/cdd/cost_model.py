"""Parameters and FLOPs of a detector at given channel widths, computed without building the network."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.base import BaseDetector
from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.surgery import PrunableLayer
from hkd_det.models.zoo import ModelComplexity, count_params_and_flops


class ChannelCostModel:
    """Computes the exact complexity of a detector at given widths of its prunable layers.

    `compute_complexity(widths)` equals `count_params_and_flops` of the network that is built with these widths.

    Args:
        detector: A detector without compactors.
        layers: The layers whose widths vary. They must run in inference.
        imgsz_hw: Input height and width, pixels.

    Attributes:
        widths: Output channels of `layers` in `detector`.
        initial_complexity: Complexity of `detector`.
    """

    def __init__(self, detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]) -> None:
        modules = dict(detector.named_modules())
        num_positions = _count_positions(detector, imgsz_hw)
        output_layers = {layer.conv: index for index, layer in enumerate(layers)}
        input_layers: dict[str, dict[int, int]] = {}
        for index, layer in enumerate(layers):
            for name in layer.consumers:
                input_layers.setdefault(name, {})[index] = layer.num_copies
        depthwise = {between.conv: index for index, layer in enumerate(layers) for between in layer.depthwise}
        norms = {layer.conv: layer.norms for layer in layers}
        for layer in layers:
            norms |= {between.conv: (between.norm,) for between in layer.depthwise}
        self._convs = []
        # Convolutions that do not run in inference, such as a head that is used in training only, cost nothing.
        for name in [name for name in output_layers | input_layers | depthwise if num_positions[name]]:
            module = modules[name]
            assert isinstance(module, nn.Conv2d)
            params_per_channel = (module.bias is not None) + sum(
                len(list(modules[norm].parameters(recurse=False))) for norm in norms.get(name, ())
            )
            copies = input_layers.get(name, {})
            variable_inputs = sum(count * modules[layers[index].conv].out_channels for index, count in copies.items())
            self._convs.append(
                _ConvCost(
                    copies,
                    output_layers.get(name, depthwise.get(name)),
                    1 if name in depthwise else module.in_channels - variable_inputs,
                    module.out_channels,
                    module.kernel_size[0] * module.kernel_size[1],
                    num_positions[name],
                    params_per_channel,
                )
            )
        self.widths = [int(modules[layer.conv].out_channels) for layer in layers]
        self.initial_complexity = count_params_and_flops(detector, imgsz_hw)
        num_params, flops = self._sum_convs(self.widths)
        self._fixed_cost = self.initial_complexity.num_params - num_params, self.initial_complexity.flops - flops

    def compute_complexity(self, widths: Sequence[int]) -> ModelComplexity:
        """Compute the complexity of the network with these widths.

        Args:
            widths: Output channels, in the order of `layers`.

        Returns:
            Parameters and FLOPs of the whole network.
        """
        num_params, flops = self._sum_convs(widths)
        return ModelComplexity(
            self._fixed_cost[0] + num_params, self._fixed_cost[1] + flops, self.initial_complexity.imgsz_hw
        )

    def _sum_convs(self, widths: Sequence[int]) -> tuple[int, int]:
        num_params, flops = zip(*(conv.compute(widths) for conv in self._convs), strict=True)
        return sum(num_params), sum(flops)


def filter_deployed_layers(
    detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]
) -> list[PrunableLayer]:
    """Return the layers that run in inference.

    Args:
        detector: The detector that contains the layers.
        layers: Candidates.
        imgsz_hw: Input height and width, pixels.

    Returns:
        The layers whose convolution runs in `detector.predict`.
    """
    num_positions = _count_positions(detector, imgsz_hw)
    return [layer for layer in layers if num_positions[layer.conv]]


@dataclass(frozen=True)
class _ConvCost:
    """A convolution with a variable number of channels.

    Attributes:
        input_layers: Layers whose channels are inputs, by index, with the number of copies of them.
        output_layer: Index of the layer whose width is the number of output channels; None if it is fixed.
        fixed_inputs: Input channels per output channel that do not vary; 1 for a depthwise convolution.
        out_channels: Output channels in the initial network.
        kernel_area: Weights per pair of an input and an output channel.
        num_positions: Output positions per image, summed over all calls.
        params_per_channel: Parameters of bias and normalizations per output channel.
    """

    input_layers: dict[int, int]
    output_layer: int | None
    fixed_inputs: int
    out_channels: int
    kernel_area: int
    num_positions: int
    params_per_channel: int

    def compute(self, widths: Sequence[int]) -> tuple[int, int]:
        """Return the number of parameters and FLOPs at these widths."""
        in_channels = self.fixed_inputs + sum(count * widths[index] for index, count in self.input_layers.items())
        out_channels = self.out_channels if self.output_layer is None else widths[self.output_layer]
        num_weights = in_channels * out_channels * self.kernel_area
        return num_weights + out_channels * self.params_per_channel, 2 * num_weights * self.num_positions


@torch.no_grad()
def _count_positions(detector: BaseDetector, imgsz_hw: tuple[int, int]) -> Counter[str]:
    """Count the output positions of every convolution for one image in inference, summed over all calls."""
    counts: Counter[str] = Counter()
    convs = [name for name, module in detector.named_modules() if isinstance(module, nn.Conv2d)]

    def count(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[name] += output.shape[-2] * output.shape[-1]

    was_training = detector.training
    try:
        with observe_calls(detector, convs, on_output=count):
            detector.eval().predict(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
    return counts
