"""Ledger: what a detector costs at given widths of its inner layers, without building it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.family import PersonDetector
from hkd_det.models.sizes import Cost, cost
from hkd_det.models.surgery import Inner


@dataclass(frozen=True)
class _Entry:
    """A convolution whose channels vary: indices of the layers that are its input and its output, None where fixed."""

    reads: int | None
    gives: int | None
    channels_in: int
    channels_out: int
    taps: int  # weights of a pair of channels
    positions: int  # cells it is applied to in a picture
    numbers_out: int  # of bias and normalisations, an output channel

    def cost(self, widths: Sequence[int]) -> tuple[int, int]:
        """Parameters and operations."""
        channels_in = self.channels_in if self.reads is None else widths[self.reads]
        channels_out = self.channels_out if self.gives is None else widths[self.gives]
        weights = channels_in * channels_out * self.taps
        return weights + channels_out * self.numbers_out, 2 * weights * self.positions


class Ledger:
    """Exact to the number: `cost(widths)` equals `models.sizes.cost` of the network with these widths."""

    def __init__(self, detector: PersonDetector, layers: Sequence[Inner], imgsz_hw: tuple[int, int]) -> None:
        """Of a detector without compactors; widths come in the order of `layers`."""
        modules = dict(detector.named_modules())
        positions = _positions(detector, imgsz_hw)
        gives = {layer.conv: index for index, layer in enumerate(layers)}
        reads = {name: index for index, layer in enumerate(layers) for name in layer.consumers}
        norms = {layer.conv: layer.norms for layer in layers}
        self._entries = []
        # What does not run when deployed, such as a head that only training reads, costs nothing.
        for name in [name for name in gives | reads if positions[name]]:
            module = modules[name]
            assert isinstance(module, nn.Conv2d)
            numbers = (module.bias is not None) + sum(
                len(list(modules[norm].parameters(recurse=False))) for norm in norms.get(name, ())
            )
            self._entries.append(
                _Entry(
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
        self.start = cost(detector, imgsz_hw)
        parameters, flops = self._sums(self.widths)
        self._fixed = self.start.parameters - parameters, self.start.flops - flops

    def cost(self, widths: Sequence[int]) -> Cost:
        """Of the network with these widths."""
        parameters, flops = self._sums(widths)
        return Cost(self._fixed[0] + parameters, self._fixed[1] + flops, self.start.imgsz_hw)

    def _sums(self, widths: Sequence[int]) -> tuple[int, int]:
        parameters, flops = zip(*(entry.cost(widths) for entry in self._entries), strict=True)
        return sum(parameters), sum(flops)


def deployed_layers(detector: PersonDetector, layers: Sequence[Inner], imgsz_hw: tuple[int, int]) -> list[Inner]:
    """Those of the layers that run when the detector is deployed."""
    positions = _positions(detector, imgsz_hw)
    return [layer for layer in layers if positions[layer.conv]]


@torch.no_grad()
def _positions(detector: PersonDetector, imgsz_hw: tuple[int, int]) -> Counter[str]:
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
        detector.eval().detect(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
        for handle in handles:
            handle.remove()
    return counts
