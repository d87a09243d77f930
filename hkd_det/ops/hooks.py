"""Forward hooks that record feature maps or observe the calls of modules. They do not change the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hkd_det.errors import UsageError

OnInput = Callable[[str, nn.Module, tuple[Any, ...]], None]
OnOutput = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


class FeatureHooks:
    """Keeps the last output of each given layer until `pop` (as timm's `FeatureHooks`).

    Args:
        model: Model whose layers are recorded.
        names: Layers as in `named_modules`.
        clone: Keep copies of the outputs. Required for layers whose output a later layer changes in place.

    Raises:
        UsageError: If the model has no layer of one of the names.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], clone: bool = False) -> None:
        modules = dict(model.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise UsageError(f"{unknown[0]}: no such layer. hkd-train --list-layers prints all layers.")
        self._outputs: dict[str, Tensor] = {}
        self._clone = clone
        self._layer_names = list(names)
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._make_hook(name)) for name in self._layer_names
        ]

    def pop(self) -> list[Tensor]:
        """Return the recorded outputs in the order of the names, and remove them to free their memory."""
        outputs = [self._outputs[name] for name in self._layer_names]
        self._outputs.clear()
        return outputs

    def close(self) -> None:
        """Remove the hooks and drop all outputs."""
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _make_hook(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output.clone() if self._clone else output

        return record


@contextmanager
def observe_calls(
    model: nn.Module,
    names: Iterable[str] | None = None,
    on_input: OnInput | None = None,
    on_output: OnOutput | None = None,
) -> Iterator[None]:
    """Call functions before and after every forward pass of given layers, inside a `with` block.

    Args:
        model: Model whose layers are observed.
        names: Layers as in `named_modules`. None: all layers except the model itself.
        on_input: Called with name, module and inputs before the layer runs.
        on_output: Called with name, module, inputs and output after the layer has run.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    with ExitStack() as stack:
        for name in modules if names is None else names:
            if on_input:
                stack.callback(modules[name].register_forward_pre_hook(_bind_input(on_input, name)).remove)
            if on_output:
                stack.callback(modules[name].register_forward_hook(_bind_output(on_output, name)).remove)
        yield


def _bind_input(on_input: OnInput, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, inputs: on_input(name, module, inputs)


def _bind_output(on_output: OnOutput, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    return lambda module, inputs, output: on_output(name, module, inputs, output)
