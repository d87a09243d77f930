"""Recording taps: the named layers' outputs while the network runs, without changing the network."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hkd_det.errors import UsageError
from hkd_det.models.tap import Tap


class TapRecorder:
    """Keeps the last output of each tapped layer until it is taken.

    copies: keep copies, for layers after which something works in place.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap], copies: bool = False) -> None:
        modules = dict(network.named_modules())
        unknown = [tap.name for tap in taps if tap.name not in modules]
        if unknown:
            raise UsageError(f"the network has no layer {unknown[0]!r} to tap")
        self._outputs: dict[str, Tensor] = {}
        self._copies = copies
        self._names = [tap.name for tap in taps]
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._recorder(name)) for name in self._names
        ]

    def take(self) -> list[Tensor]:
        """The recorded maps in the order of the taps; they are forgotten here, so that no step holds the last one's."""
        maps = [self._outputs[name] for name in self._names]
        self._outputs.clear()
        return maps

    def close(self) -> None:
        """Stop recording and let go of everything."""
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _recorder(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output.clone() if self._copies else output

        return record
