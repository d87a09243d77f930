"""Compactor: what stands behind an inner layer's normalisation; the norms of its rows are its channels' importances."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.family import BaseDetector
from hkd_det.models.narrow import PRUNABLE_NORMS, is_dense_conv
from hkd_det.models.surgery import PrunableLayer


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
