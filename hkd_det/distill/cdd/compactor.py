"""Compactors: 1x1 convolutions behind normalization layers, whose row norms measure the importance of channels.

The first part inserts compactors into a network and finds them. The second part contains the group lasso and the
gradient resetting that shrink the rows of masked channels to 0 (Xie et al. 2023).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.base import BaseDetector
from hkd_det.models.surgery import PRUNABLE_NORMS, PrunableLayer, is_dense_conv

EPS = 1e-8  # a row of zeros has no direction; without EPS its gradient would be NaN


class Compactor(nn.Module):
    """A 1x1 convolution with C input and output channels and no bias, initialized to the identity.

    A dense compactor mixes channels, as in the paper. A convolution shared by several levels, with one normalization
    per level, needs a diagonal compactor. diag(w) scales every normalization and can be fused into it. A dense W would
    need a different convolution W diag(g_level) K per level.

    Args:
        channels: Number of channels C.
        is_dense: Whether the weight is a full matrix (True) or a diagonal (False).

    Attributes:
        weight (Parameter[C, C, 1, 1] or [C, 1, 1, 1]): Dense or diagonal weight.
        masked (bool Tensor[C]): Channels whose rows shrink to 0 or are 0.
    """

    masked: Tensor

    def __init__(self, channels: int, is_dense: bool) -> None:
        super().__init__()
        identity = torch.eye(channels) if is_dense else torch.ones(channels, 1)
        self.is_dense = is_dense
        self.weight = nn.Parameter(identity[..., None, None])
        self.register_buffer("masked", torch.zeros(channels, dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Apply the 1x1 convolution.

        Args:
            features (Tensor[B, C, H, W]): Normalized features.

        Returns:
            Tensor[B, C, H, W] of the same dtype.
        """
        if self.is_dense:
            return F.conv2d(features, self.weight)
        # The cast keeps bfloat16 features of autocast in bfloat16; float32 would slow down all later layers.
        return features * self.weight[:, 0].to(features.dtype)

    @property
    def rows(self) -> Tensor:
        """The weight as Tensor[C, C] (dense) or Tensor[C, 1] (diagonal), one row per output channel."""
        return self.weight.flatten(1)

    @property
    def is_faded(self) -> bool:
        """Whether the rows of all masked channels are 0."""
        return not bool(self.rows[self.masked].any())

    def apply_to_vectors(self, vectors: Tensor) -> Tensor:
        """Apply the compactor to averaged features. Averaging and 1x1 convolution commute.

        Args:
            vectors (Tensor[N, C]): Features in front of the compactor, averaged over regions.

        Returns:
            Tensor[N, C], averaged features behind the compactor.
        """
        return vectors @ self.rows.T if self.is_dense else vectors * self.rows[:, 0]


class NormWithCompactor(nn.Module):
    """A normalization layer followed by a compactor. It replaces the normalization layer in the network.

    Args:
        norm: The normalization layer.
        compactor: The compactor, possibly shared with other levels.
        is_owner: Whether this module registers the compactor as its submodule. Exactly one level does.
    """

    def __init__(self, norm: nn.Module, compactor: Compactor, is_owner: bool) -> None:
        super().__init__()
        self.norm = norm
        self.compactor = compactor if is_owner else None
        # A tuple hides the module from registration: a shared compactor is trained, averaged and saved once.
        # deepcopy keeps the sharing.
        self._shared = (compactor,)

    def forward(self, features: Tensor) -> Tensor:
        """Normalize the features and apply the compactor.

        Args:
            features (Tensor[B, C, H, W]): Output of the convolution.

        Returns:
            Tensor[B, C, H, W].
        """
        (compactor,) = self._shared
        compacted: Tensor = compactor(self.norm(features))
        return compacted


@dataclass(frozen=True, eq=False)
class CompactorSite:
    """A prunable layer and its compactor.

    Attributes:
        layer: The layer, with module names as they were without compactors.
        compactor: The compactor behind the layer's normalization.
    """

    layer: PrunableLayer
    compactor: Compactor


def find_prunable_layers(network: BaseDetector) -> list[PrunableLayer]:
    """Return the prunable layers that can get a compactor: batch-normalized convolutions without bias.

    Args:
        network: A network without compactors.

    Returns:
        The layers, in the order of `network.prunable_layers()`.
    """
    return [
        layer
        for layer in network.prunable_layers()
        if layer.norms
        and all(type(network.get_submodule(name)) in PRUNABLE_NORMS for name in layer.norms)
        and network.get_submodule(layer.conv).bias is None
    ]


def insert_compactors(network: BaseDetector, layers: Iterable[PrunableLayer]) -> list[CompactorSite]:
    """Insert identity compactors behind the normalization of layers, in place.

    Args:
        network: The network to modify. Its outputs do not change.
        layers: Layers of `find_prunable_layers`.

    Returns:
        The layers with their compactors.
    """
    return [CompactorSite(layer, _insert_compactor(network, layer)) for layer in layers]


def find_compactors(network: BaseDetector) -> list[CompactorSite]:
    """Return the compactors of a network.

    Args:
        network: A network with or without compactors.

    Returns:
        The layers with their compactors, in the order of `network.prunable_layers()`.
    """
    return [
        CompactorSite(layer, module.compactor)
        for layer in network.prunable_layers()
        for module in map(network.get_submodule, layer.norms)
        if isinstance(module, NormWithCompactor) and module.compactor is not None
    ]


def compute_group_lasso(rows: Tensor) -> Tensor:
    """Compute the group lasso, sum_i ||W_i||_2.

    Args:
        rows (Tensor[C, K]): Rows of a compactor.

    Returns:
        Scalar tensor.
    """
    return rows.norm(dim=1).sum()


def compute_group_lasso_gradient(rows: Tensor) -> Tensor:
    """Compute the gradient of the group lasso, W_i / (||W_i|| + eps). It is 0 at a row of zeros.

    Args:
        rows (Tensor[C, K]): Rows of a compactor.

    Returns:
        Tensor[C, K].
    """
    return rows / (rows.norm(dim=1, keepdim=True) + EPS)


def reset_gradient(grad: Tensor, rows: Tensor, masked: Tensor, weight: float) -> Tensor:
    """Add the lasso gradient, and remove all other gradients of masked rows (gradient resetting of ResRep).

    The result is (1 - masked) grad + weight W_i / (||W_i|| + eps).

    Args:
        grad (Tensor[C, K]): Gradient of the losses.
        rows (Tensor[C, K]): Rows of the compactor.
        masked (bool Tensor[C]): Masked channels.
        weight: Weight of the lasso.

    Returns:
        Tensor[C, K], the gradient for the optimizer.
    """
    return grad * ~masked[:, None] + weight * compute_group_lasso_gradient(rows)


def apply_proximal_step(rows: Tensor, threshold: float) -> Tensor:
    """Apply the proximal operator of the group lasso: shorten each row by `threshold`, shorter rows to exactly 0.

    It equals a gradient step of that length, but does not oscillate around 0.

    Args:
        rows (Tensor[C, K]): Rows of a compactor.
        threshold: Length to subtract from each row norm.

    Returns:
        Tensor[C, K].
    """
    norms = rows.norm(dim=1, keepdim=True)
    return rows * ((norms - threshold).clamp(min=0) / (norms + EPS))


def _insert_compactor(network: BaseDetector, layer: PrunableLayer) -> Compactor:
    conv = network.get_submodule(layer.conv)
    assert isinstance(conv, nn.Conv2d) and is_dense_conv(conv)
    compactor = Compactor(conv.out_channels, is_dense=len(layer.norms) == 1)
    for index, name in enumerate(layer.norms):
        parent, _, attribute = name.rpartition(".")
        wrapped = NormWithCompactor(network.get_submodule(name), compactor, is_owner=index == 0)
        # setattr also replaces the entries of nn.Sequential and nn.ModuleList.
        setattr(network.get_submodule(parent), attribute, wrapped)
    return compactor
