"""Compactors: 1x1 convolutions behind normalization layers, whose row norms measure the importance of channels.

The first part inserts compactors into a network and finds them. The second part contains the group lasso and the
gradient resetting that shrink the rows of masked channels to 0 (Xie et al. 2023). The third part fuses compactors into
the network and removes the masked channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.surgery import PRUNABLE_NORMS, DepthwiseLayer, PrunableLayer, is_dense_conv

EPS = 1e-8  # a row of zeros has no direction; without EPS its gradient would be NaN
_StateDict = dict[str, Tensor]


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
