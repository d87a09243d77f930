"""Folding: compactors and masked channels gone, a plain network of its family left that says the same."""

from dataclasses import replace

import torch
from torch import Tensor

from hkd_det.distill.capacity.compactor import Compacted, Site, sites_of
from hkd_det.models.families import build
from hkd_det.models.family import PersonDetector

State = dict[str, Tensor]


@torch.no_grad()
def folded(detector: PersonDetector) -> PersonDetector:
    """A new detector without the masked channels, in evaluation mode on the same device.

    It answers as `detector` does in evaluation mode once its masked rows are 0. A mixing compactor W
    becomes part of the convolution, K' = W diag(g / sigma) K, whose normalisation is left with W b' as its bias; a
    diagonal one of the normalisations. Folded in double precision.
    """
    state = _without_compactors(detector)
    widths: dict[str, int] = {}
    for site in sites_of(detector):
        keep = (~site.compactor.masked).nonzero()[:, 0]
        if site.compactor.mixes:
            _fold_into_convolution(detector, state, site, keep)
        else:
            _fold_into_norms(state, site, keep)
        for name in site.layer.consumers:
            state[f"{name}.weight"] = state[f"{name}.weight"][:, keep]
        if len(keep) < len(site.compactor.masked) or site.layer.conv in detector.changes.widths:
            widths[site.layer.conv] = len(keep)
    changes = replace(detector.changes, widths={**detector.changes.widths, **widths})
    network = build(detector.spec, changes)
    network.load_state_dict(state)
    return network.to(next(detector.parameters()).device).eval()


def _without_compactors(detector: PersonDetector) -> State:
    """The weights under the names that they have without compactors."""
    state: State = dict(detector.state_dict())
    for name, module in detector.named_modules():
        if isinstance(module, Compacted):
            inside = f"{name}.norm."
            for key in [key for key in state if key.startswith(f"{name}.compactor.")]:
                del state[key]
            for key in [key for key in state if key.startswith(inside)]:
                state[f"{name}.{key.removeprefix(inside)}"] = state.pop(key)
    return state


def _fold_into_convolution(detector: PersonDetector, state: State, site: Site, keep: Tensor) -> None:
    (norm,), conv = site.layer.norms, site.layer.conv
    eps = float(detector.get_submodule(f"{norm}.norm").eps)  # type: ignore[arg-type]
    weight, bias, mean, variance = (
        state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    rows = site.compactor.rows.double()[keep]  # [kept, C]
    scale = weight / (variance + eps).sqrt()
    kernels = state[f"{conv}.weight"]
    mixed = (rows * scale) @ kernels.double().flatten(1)
    state[f"{conv}.weight"] = mixed.view(len(keep), *kernels.shape[1:]).to(kernels.dtype)
    like = state[f"{norm}.weight"]
    state[f"{norm}.weight"] = torch.full_like(like[keep], (1 + eps) ** 0.5)
    state[f"{norm}.bias"] = (rows @ (bias - scale * mean)).to(like.dtype)
    state[f"{norm}.running_mean"] = torch.zeros_like(like[keep])
    state[f"{norm}.running_var"] = torch.ones_like(like[keep])


def _fold_into_norms(state: State, site: Site, keep: Tensor) -> None:
    kernels, scale = f"{site.layer.conv}.weight", site.compactor.rows[keep, 0]
    state[kernels] = state[kernels][keep]
    for norm in site.layer.norms:
        for part in ("weight", "bias"):
            state[f"{norm}.{part}"] = state[f"{norm}.{part}"][keep] * scale
        for part in ("running_mean", "running_var"):
            state[f"{norm}.{part}"] = state[f"{norm}.{part}"][keep]
