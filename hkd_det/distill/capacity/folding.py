"""Folding: compactors and masked channels gone, a plain network of its family left that says the same."""

from dataclasses import replace

import torch
from torch import Tensor

from hkd_det.distill.capacity.compactor import CompactorSite, NormWithCompactor, find_compactors
from hkd_det.models.families import build_from_spec
from hkd_det.models.family import BaseDetector

_StateDict = dict[str, Tensor]


@torch.no_grad()
def fuse_compactors(detector: BaseDetector) -> BaseDetector:
    """A new detector without the masked channels, in evaluation mode on the same device.

    It answers as `detector` does in evaluation mode once its masked rows are 0. A mixing compactor W
    becomes part of the convolution, K' = W diag(g / sigma) K, whose normalisation is left with W b' as its bias; a
    diagonal one of the normalisations. Folded in double precision.
    """
    state = _strip_compactors(detector)
    widths: dict[str, int] = {}
    for site in find_compactors(detector):
        keep = (~site.compactor.masked).nonzero()[:, 0]
        if site.compactor.is_dense:
            _fuse_into_conv(detector, state, site, keep)
        else:
            _fuse_into_norms(state, site, keep)
        for name in site.layer.consumers:
            state[f"{name}.weight"] = state[f"{name}.weight"][:, keep]
        if len(keep) < len(site.compactor.masked) or site.layer.conv in detector.changes.widths:
            widths[site.layer.conv] = len(keep)
    changes = replace(detector.changes, widths={**detector.changes.widths, **widths})
    network = build_from_spec(detector.spec, changes)
    network.load_state_dict(state)
    return network.to(next(detector.parameters()).device).eval()


def _strip_compactors(detector: BaseDetector) -> _StateDict:
    """The weights under the names that they have without compactors."""
    state: _StateDict = dict(detector.state_dict())
    for name, module in detector.named_modules():
        if isinstance(module, NormWithCompactor):
            inside = f"{name}.norm."
            for key in [key for key in state if key.startswith(f"{name}.compactor.")]:
                del state[key]
            for key in [key for key in state if key.startswith(inside)]:
                state[f"{name}.{key.removeprefix(inside)}"] = state.pop(key)
    return state


def _fuse_into_conv(detector: BaseDetector, state_dict: _StateDict, site: CompactorSite, keep: Tensor) -> None:
    (norm,), conv = site.layer.norms, site.layer.conv
    eps = float(detector.get_submodule(f"{norm}.norm").eps)  # type: ignore[arg-type]
    weight, bias, mean, variance = (
        state_dict[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    rows = site.compactor.rows.double()[keep]  # [kept, C]
    scale = weight / (variance + eps).sqrt()
    kernels = state_dict[f"{conv}.weight"]
    mixed = (rows * scale) @ kernels.double().flatten(1)
    state_dict[f"{conv}.weight"] = mixed.view(len(keep), *kernels.shape[1:]).to(kernels.dtype)
    like = state_dict[f"{norm}.weight"]
    state_dict[f"{norm}.weight"] = torch.full_like(like[keep], (1 + eps) ** 0.5)
    state_dict[f"{norm}.bias"] = (rows @ (bias - scale * mean)).to(like.dtype)
    state_dict[f"{norm}.running_mean"] = torch.zeros_like(like[keep])
    state_dict[f"{norm}.running_var"] = torch.ones_like(like[keep])


def _fuse_into_norms(state_dict: _StateDict, site: CompactorSite, keep: Tensor) -> None:
    kernels, scale = f"{site.layer.conv}.weight", site.compactor.rows[keep, 0]
    state_dict[kernels] = state_dict[kernels][keep]
    for norm in site.layer.norms:
        for part in ("weight", "bias"):
            state_dict[f"{norm}.{part}"] = state_dict[f"{norm}.{part}"][keep] * scale
        for part in ("running_mean", "running_var"):
            state_dict[f"{norm}.{part}"] = state_dict[f"{norm}.{part}"][keep]
