"""Compactor: what stands behind an inner layer's normalisation; the norms of its rows are its channels' importances.

Lasso on a compactor's rows, and guided gradient resetting: how a channel fades (Xie et al. 2023).

Folding: compactors and masked channels gone, a plain network of its family left that says the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.surgery import PRUNABLE_NORMS, PrunableLayer, is_dense_conv


class Compactor(nn.Module):
    """A 1x1 convolution C -> C without bias that begins as the identity.

    mixes: whether a row may weigh other channels than its own, as in the paper. Where a convolution is shared by
    levels with a normalisation each, rows are confined to the diagonal: diag(w) scales every level's normalisation and
    so folds into it, while a mixing W would make of one convolution K a different one, W diag(g_level) K, a level.
    masked: [C] bool, channels that fade or have faded.
    """

    masked: Tensor

    def __init__(self, channels: int, is_dense: bool) -> None:
        super().__init__()
        start = torch.eye(channels) if is_dense else torch.ones(channels, 1)
        self.is_dense = is_dense
        self.weight = nn.Parameter(start[..., None, None])
        self.register_buffer("masked", torch.zeros(channels, dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W], the same shape out."""
        if self.is_dense:
            return F.conv2d(features, self.weight)
        # Else autocast's bfloat16 features would become float32 here, and all that follows would be slower.
        return features * self.weight[:, 0].to(features.dtype)

    @property
    def rows(self) -> Tensor:
        """[C, C], or [C, 1] of a diagonal: the weights that make each channel."""
        return self.weight.flatten(1)

    @property
    def is_faded(self) -> bool:
        """Whether every masked channel is 0 by now."""
        return not bool(self.rows[self.masked].any())

    def apply_to_vectors(self, vectors: Tensor) -> Tensor:
        """[N, C] pooled vectors behind the compactor from those before it: averaging and 1x1 convolution commute."""
        return vectors @ self.rows.T if self.is_dense else vectors * self.rows[:, 0]


class NormWithCompactor(nn.Module):
    """A normalisation and the compactor behind it, in the normalisation's place."""

    def __init__(self, norm: nn.Module, compactor: Compactor, is_owner: bool) -> None:
        super().__init__()
        self.norm = norm
        self.compactor = compactor if is_owner else None
        # In a tuple, so no submodule: what several levels share is trained, averaged and saved once. Copies share, too.
        self._shared = (compactor,)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W], the same shape out."""
        (compactor,) = self._shared
        mixed: Tensor = compactor(self.norm(features))
        return mixed


@dataclass(frozen=True, eq=False)
class CompactorSite:
    """An inner layer, named as before anything was put in, and its compactor."""

    layer: PrunableLayer
    compactor: Compactor


def find_prunable_layers(network: BaseDetector) -> list[PrunableLayer]:
    """The inner layers that a compactor can stand in: batch-normalised ones, whose convolution so needs no bias."""
    return [
        layer
        for layer in network.prunable_layers()
        if layer.norms
        and all(type(network.get_submodule(name)) in PRUNABLE_NORMS for name in layer.norms)
        and network.get_submodule(layer.conv).bias is None
    ]


def insert_compactors(network: BaseDetector, layers: Iterable[PrunableLayer]) -> list[CompactorSite]:
    """Put compactors, which change nothing yet, behind the layers' normalisations, in place."""
    return [CompactorSite(layer, _insert_compactor(network, layer)) for layer in layers]


def find_compactors(network: BaseDetector) -> list[CompactorSite]:
    """The compactors that stand in a network already."""
    return [
        CompactorSite(layer, module.compactor)
        for layer in network.prunable_layers()
        for module in map(network.get_submodule, layer.norms)
        if isinstance(module, NormWithCompactor) and module.compactor is not None
    ]


def _insert_compactor(network: BaseDetector, layer: PrunableLayer) -> Compactor:
    convolution = network.get_submodule(layer.conv)
    assert isinstance(convolution, nn.Conv2d) and is_dense_conv(convolution)
    compactor = Compactor(convolution.out_channels, is_dense=len(layer.norms) == 1)
    for index, name in enumerate(layer.norms):
        parent, _, last = name.rpartition(".")
        wrapped = NormWithCompactor(network.get_submodule(name), compactor, is_owner=index == 0)
        # Assigned by name, as a member of a Sequential or a list is registered, too.
        setattr(network.get_submodule(parent), last, wrapped)
    return compactor


EPS = 1e-8  # a row of zeros has no direction; without this its gradient would be NaN


def group_lasso(rows: Tensor) -> Tensor:
    """sum_i ||W_i||_2 over the rows of [C, K], a scalar."""
    return rows.norm(dim=1).sum()


def group_lasso_gradient(rows: Tensor) -> Tensor:
    """[C, K] the gradient of `lasso`, W_i / (||W_i|| + eps): finite everywhere, 0 at a row of zeros."""
    return rows / (rows.norm(dim=1, keepdim=True) + EPS)


def reset_gradient(grad: Tensor, rows: Tensor, masked: Tensor, weight: float) -> Tensor:
    """[C, K] M grad + lambda W_i / (||W_i|| + eps): a masked row hears the lasso alone. masked: [C] bool."""
    return grad * ~masked[:, None] + weight * group_lasso_gradient(rows)


def proximal_step(rows: Tensor, threshold: float) -> Tensor:
    """[C, K] rows shortened by `force`, those shorter than it exactly 0: the lasso's proximal step.

    It is where a gradient step of that length would lead, without its swinging to and fro around 0.
    """
    norm = rows.norm(dim=1, keepdim=True)
    return rows * ((norm - threshold).clamp(min=0) / (norm + EPS))


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
