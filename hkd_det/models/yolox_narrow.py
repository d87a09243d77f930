"""A narrower YOLOX from a trained one: channels are selected, and the weights that read them are fitted again.

The selection is greedy. It minimizes the squared error of the outputs to second order (Gauss-Newton), if the removed
channels are predicted from the remaining ones. The weights follow in execution order by least squares, so that each
layer corrects the errors of the layers before it, as in He et al. 2017 (channel pruning).
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.yolox import YOLOX, Bottleneck, ConvNormAct, CSPLayer, YOLOXSpec

RIDGE = 1e-3  # ratio of the mean square of the inputs
MIN_SCORE = 0.02  # boxes with a lower score do not count
BOX_WEIGHT = 4.0  # an error of 0.25 strides counts as much as an error of 1 in the logit


def narrow_yolox(source: YOLOX, spec: YOLOXSpec, images: Tensor) -> YOLOX:
    """Build a network with fewer channels that computes nearly the same function.

    Args:
        source: Detector without changes, with the statistics of its normalizations, on the CPU.
        spec: Architecture of the result: that of the source, with fewer channels per layer.
        images (Tensor[B, 3, H, W]): RGB, 0 to 255. More images give a better fit; 64 are enough.

    Returns:
        The narrow detector in evaluation mode.
    """
    narrow = YOLOX(spec).eval()
    keep = _select_channels(source.eval(), narrow, images)
    inputs = _find_kept_inputs(source, keep)
    weights = narrow.state_dict()
    for name, value in source.state_dict().items():
        block = name.rpartition(".")[0].removesuffix(".conv").removesuffix(".bn")
        kept = value
        if value.ndim and block in keep:
            kept = kept[keep[block]]
        if value.ndim == 4 and value.shape[1] > 1:
            kept = kept[:, inputs[block]]
        weights[name] = kept
    narrow.load_state_dict(weights)
    _fit_weights(source, narrow, keep, images)
    return narrow


def _is_depthwise(block: nn.Module) -> bool:
    return isinstance(block, ConvNormAct) and block.conv.groups > 1


def _list_blocks(network: YOLOX) -> dict[str, ConvNormAct]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ConvNormAct)}


def _find_shared_channels(network: YOLOX) -> dict[str, str]:
    """Return the blocks whose outputs are added, each with the first block of its sum. They keep the same channels."""
    shared: dict[str, str] = {}
    blocks = _list_blocks(network)
    for name, module in network.named_modules():
        if isinstance(module, CSPLayer) and isinstance(module.m[0], Bottleneck) and module.m[0].shortcut:
            for conv2 in (f"{name}.m.{index}.conv2" for index in range(len(module.m))):
                shared[conv2 if conv2 in blocks else f"{conv2}.pconv"] = f"{name}.conv1"
    return shared


def _select_channels(source: YOLOX, narrow: YOLOX, images: Tensor) -> dict[str, Tensor]:
    """Return the indices of the channels that remain, per block that is not depthwise."""
    moments = _measure_moments(source, images)
    shared = _find_shared_channels(source)
    widths = {name: block.conv.out_channels for name, block in _list_blocks(narrow).items()}
    for name, leader in shared.items():
        moments[leader] = (moments[leader][0] + moments[name][0], moments[leader][1] + moments[name][1])
    keep = {name: select_columns(*moments[name], widths[name]) for name in moments if name not in shared}
    return keep | {name: keep[leader] for name, leader in shared.items()}


def select_columns(gram: Tensor, curvature: Tensor, count: int) -> Tensor:
    """Select columns of X that predict all columns, greedily.

    Args:
        gram (float64 Tensor[C, C]): X^T X.
        curvature (float64 Tensor[C, C]): Weight M of the squared error E: the cost is tr(E M E^T).
        count: Columns to select.

    Returns:
        long Tensor[count], sorted.
    """
    residual = gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    selected: list[int] = []
    for _ in range(count):
        gains = ((residual @ curvature) * residual).sum(1) / residual.diagonal().clamp(min=1e-12)
        gains[selected] = -1
        best = int(gains.argmax())
        selected.append(best)
        residual = residual - torch.outer(residual[best], residual[best]) / residual[best, best].clamp(min=1e-12)
    return torch.tensor(sorted(selected))


def _measure_moments(network: YOLOX, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sums over positions of outputs and of their gradients, each as a product [C, C], per block."""
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    names = [name for name, block in _list_blocks(network).items() if not _is_depthwise(block)]

    def record(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    for batch in torch.split(images, 8):
        with torch.enable_grad(), observe_calls(network, names, on_output=record):
            torch.autograd.backward(_sum_outputs_with_random_signs(network, batch))
        for name, output in outputs.items():
            assert output.grad is not None
            old = moments.get(name, (0.0, 0.0))
            moments[name] = (old[0] + _compute_gram(output.detach()), old[1] + _compute_gram(output.grad, center=False))
    network.zero_grad()
    return moments


def _sum_outputs_with_random_signs(network: YOLOX, images: Tensor) -> Tensor:
    """Return a weighted sum of all outputs.

    The expected product of its gradients is the Gauss-Newton matrix of dense distillation: cross-entropy of the score,
    squared error of the boxes, weighted by the score.
    """
    class_logits, box_outputs, objectness = network.head(network.forward_features(images))
    scores = (class_logits.sigmoid() * objectness.sigmoid()).detach()
    log_scores = F.logsigmoid(class_logits) + F.logsigmoid(objectness)
    score_signs, box_signs = (torch.randint_like(values, 2) * 2 - 1 for values in (class_logits, box_outputs))
    box_weights = (scores * (scores > MIN_SCORE)).sqrt() * BOX_WEIGHT
    score_sum = (score_signs * (scores / (1 - scores).clamp(min=1e-3)).sqrt() * log_scores).sum()
    box_sum = (box_signs * box_weights[..., None] * box_outputs).sum()
    total: Tensor = score_sum + box_sum
    return total


def _compute_gram(values: Tensor, center: bool = True) -> Tensor:
    """Return the products of all pairs of channels of values [B, C, H, W], summed over positions: float64 [C, C]."""
    rows = values.transpose(0, 1).flatten(1).double()
    if center:
        rows = rows - rows.mean(1, keepdim=True)
    return rows @ rows.T


@torch.no_grad()
def _find_kept_inputs(source: YOLOX, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the indices of the input channels that remain, per block and output layer.

    The network runs with the output of each block replaced by 1 in kept and 0 in removed channels. The layers between
    blocks (concatenation, sum, pooling, upsampling) then show which channels of an input remain.
    """
    inputs: dict[str, Tensor] = {}

    def replace_output(name: str, block: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        inputs[name] = (args[0][0, :, 0, 0] > 0).nonzero()[:, 0]
        if _is_depthwise(block):
            keep[name] = inputs[name]
        mask = torch.zeros_like(output)
        mask[:, keep.get(name, slice(None))] = 1
        return mask

    output_layers = {name: module for name, module in source.named_modules() if "_preds." in name}
    with ExitStack() as stack:
        for name, block in {**output_layers, **_list_blocks(source)}.items():
            stack.callback(block.register_forward_hook(partial(replace_output, name)).remove)
        source(torch.ones(1, 3, 64, 64))
    return inputs


@torch.no_grad()
def _fit_weights(source: YOLOX, narrow: YOLOX, keep: dict[str, Tensor], images: Tensor) -> None:
    """Fit the dense convolutions of the narrow network to the outputs of the source, in execution order."""
    targets: dict[str, Tensor] = {}

    def store(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if _is_fitted(module):
            block = name.removesuffix(".conv")
            targets[name] = output[:, keep[block]] if block in keep else output

    def fit(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and _is_fitted(module):
            bias = _fit_conv(module, inputs[0], targets.pop(name))
            if module.bias is not None:
                module.bias.copy_(bias)
            else:
                norm = narrow.get_submodule(f"{name.removesuffix('.conv')}.bn")
                assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
                norm.running_mean.sub_(bias)

    with observe_calls(source, on_output=store):
        source(images)
    with observe_calls(narrow, on_input=fit):
        narrow(images)


def _is_fitted(module: nn.Module) -> bool:
    """Return whether a layer reads channels that may have been removed, and mixes them."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3  # the stem reads RGB


def _fit_conv(conv: nn.Conv2d, inputs: Tensor, target: Tensor) -> Tensor:
    """Fit the weights of a convolution by ridge regression towards the present ones.

    Args:
        conv: Convolution; its weights are replaced.
        inputs (Tensor[B, C, H, W]): Its inputs.
        target (Tensor[B, O, H, W]): Wanted outputs.

    Returns:
        float64 Tensor[O], the bias.
    """
    old = conv.weight.flatten(1).double()
    moments = torch.zeros(old.shape[1] + 1, old.shape[1] + 1 + len(old), dtype=torch.float64)
    for maps, wanted in zip(torch.split(inputs, 4), torch.split(target, 4), strict=True):
        assert not isinstance(conv.padding, str)
        columns = F.unfold(maps, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        x = torch.cat([columns, torch.ones_like(columns[:, :1])], 1).transpose(0, 1).flatten(1).double()
        moments += x @ torch.cat([x, wanted.transpose(0, 1).flatten(1).double()]).T
    gram, products = moments[:, : len(moments)], moments[:, len(moments) :]
    ridge = RIDGE * (gram.diagonal()[:-1].mean()) * torch.ones(len(gram), dtype=gram.dtype)
    ridge[-1] = 0  # the bias is free
    prior = torch.cat([old, old.new_zeros(len(old), 1)], 1)
    weight = torch.linalg.solve(gram + ridge.diag(), products + (prior * ridge).T).T
    conv.weight.copy_(weight[:, :-1].view_as(conv.weight))
    return weight[:, -1]
