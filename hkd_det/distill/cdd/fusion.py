"""Fusion of compactors into the network, with removal of the masked channels."""

from dataclasses import replace

import torch
from torch import Tensor

from hkd_det.distill.cdd.compactor import CompactorSite, NormWithCompactor, find_compactors
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.surgery import DepthwiseLayer

_StateDict = dict[str, Tensor]


@torch.no_grad()
def fuse_compactors(detector: BaseDetector) -> BaseDetector:
    """Build an equivalent network without compactors and masked channels.

    The outputs equal those of `detector` in evaluation mode if all masked rows are 0. A dense compactor W is fused into
    the convolution: K' = W diag(g / sigma) K, and the bias of the normalization becomes W b'. A diagonal compactor is
    fused into the normalization. Fusing uses double precision.

    Args:
        detector: A network with compactors; it is not modified.

    Returns:
        A new detector in evaluation mode on the same device.
    """
    state_dict = _strip_compactors(detector)
    widths: dict[str, int] = {}
    for site in find_compactors(detector):
        remains = ~site.compactor.masked
        keep = remains.nonzero()[:, 0]
        if site.compactor.is_dense:
            _fuse_into_conv(detector, state_dict, site, keep)
        else:
            _fuse_into_norms(state_dict, site, keep)
        for between in site.layer.depthwise:
            _fuse_constants(detector, state_dict, between, remains)
        for name in site.layer.consumers:
            weight = state_dict[f"{name}.weight"]
            state_dict[f"{name}.weight"] = weight[:, site.layer.select_inputs(name, weight.shape[1], remains)]
        if len(keep) < len(site.compactor.masked) or site.layer.conv in detector.changes.widths:
            widths[site.layer.conv] = len(keep)
    changes = replace(detector.changes, widths={**detector.changes.widths, **widths})
    network = build_from_spec(detector.spec, changes)
    network.load_state_dict(state_dict)
    return network.to(next(detector.parameters()).device).eval()


def _strip_compactors(detector: BaseDetector) -> _StateDict:
    """Return the state dict without compactors, under the names that the layers have without them."""
    state_dict: _StateDict = dict(detector.state_dict())
    for name, module in detector.named_modules():
        if isinstance(module, NormWithCompactor):
            norm_prefix = f"{name}.norm."
            for key in [key for key in state_dict if key.startswith(f"{name}.compactor.")]:
                del state_dict[key]
            for key in [key for key in state_dict if key.startswith(norm_prefix)]:
                state_dict[f"{name}.{key.removeprefix(norm_prefix)}"] = state_dict.pop(key)
    return state_dict


def _fuse_into_conv(detector: BaseDetector, state_dict: _StateDict, site: CompactorSite, keep: Tensor) -> None:
    """Fuse normalization and dense compactor into the convolution. The normalization keeps only a bias."""
    (norm,), conv = site.layer.norms, site.layer.conv
    eps = float(detector.get_submodule(f"{norm}.norm").eps)  # type: ignore[arg-type]  # nn.Module attributes are untyped
    weight, bias, mean, variance = (
        state_dict[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    rows = site.compactor.rows.double()[keep]  # [kept, C]
    scale = weight / (variance + eps).sqrt()
    kernels = state_dict[f"{conv}.weight"]
    fused = (rows * scale) @ kernels.double().flatten(1)
    state_dict[f"{conv}.weight"] = fused.view(len(keep), *kernels.shape[1:]).to(kernels.dtype)
    template = state_dict[f"{norm}.weight"]
    state_dict[f"{norm}.weight"] = torch.full_like(template[keep], (1 + eps) ** 0.5)  # cancels running_var + eps
    state_dict[f"{norm}.bias"] = (rows @ (bias - scale * mean)).to(template.dtype)
    state_dict[f"{norm}.running_mean"] = torch.zeros_like(template[keep])
    state_dict[f"{norm}.running_var"] = torch.ones_like(template[keep])


def _fuse_into_norms(state_dict: _StateDict, site: CompactorSite, keep: Tensor) -> None:
    """Fuse a diagonal compactor into the normalization of every level."""
    kernels, scale = f"{site.layer.conv}.weight", site.compactor.rows[keep, 0]
    state_dict[kernels] = state_dict[kernels][keep]
    for norm in site.layer.norms:
        for name in ("weight", "bias"):
            state_dict[f"{norm}.{name}"] = state_dict[f"{norm}.{name}"][keep] * scale
        for name in ("running_mean", "running_var"):
            state_dict[f"{norm}.{name}"] = state_dict[f"{norm}.{name}"][keep]


def _fuse_constants(detector: BaseDetector, state_dict: _StateDict, layer: DepthwiseLayer, remains: Tensor) -> None:
    """Remove channels that are 0 from a depthwise convolution, and move their effect to the next normalization.

    Normalization and activation turn a channel of zeros into a constant, which the consumer reads.
    """
    norm, eps = layer.norm, float(detector.get_submodule(layer.norm).eps)  # type: ignore[arg-type]  # untyped attribute
    scale = state_dict[f"{norm}.weight"] / (state_dict[f"{norm}.running_var"] + eps).sqrt()
    constants = state_dict[f"{norm}.bias"] - scale * state_dict[f"{norm}.running_mean"]
    removed = ~remains
    activated: Tensor = detector.get_submodule(layer.act)(constants[removed].clone())
    mean = f"{layer.consumer_norm}.running_mean"
    state_dict[mean] = state_dict[mean] - state_dict[f"{layer.consumer}.weight"][:, removed, 0, 0] @ activated
    for name in (layer.conv, norm):
        for key, value in _select_own_tensors(state_dict, name):
            state_dict[key] = value[remains] if value.ndim else value


def _select_own_tensors(state_dict: _StateDict, name: str) -> list[tuple[str, Tensor]]:
    """Return the entries of a module without children."""
    return [(key, value) for key, value in state_dict.items() if key.rpartition(".")[0] == name]
