"""Recording taps: the named layers' outputs while the network runs, without changing the network."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hkd_det.errors import UsageError
from hkd_det.models.base import FeatureInfo


class FeatureHooks:
    """Keeps the last output of each tapped layer until it is taken.

    copies: keep copies, for layers after which something works in place.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FeatureInfo], clone: bool = False) -> None:
        modules = dict(model.named_modules())
        unknown = [tap.name for tap in layers if tap.name not in modules]
        if unknown:
            raise UsageError(f"the network has no layer {unknown[0]!r} to tap")
        self._outputs: dict[str, Tensor] = {}
        self._clone = clone
        self._layer_names = [tap.name for tap in layers]
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._make_hook(name)) for name in self._layer_names
        ]

    def pop(self) -> list[Tensor]:
        """The recorded maps in the order of the taps; they are forgotten here, so that no step holds the last one's."""
        maps = [self._outputs[name] for name in self._layer_names]
        self._outputs.clear()
        return maps

    def close(self) -> None:
        """Stop recording and let go of everything."""
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _make_hook(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output.clone() if self._clone else output

        return record
