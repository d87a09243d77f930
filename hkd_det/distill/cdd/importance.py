"""What the pruner weighs for each channel: its importance for the student, and its parameters and FLOPs.

Importance: for every person the nearest vectors of its teacher vector are retrieved from a queue of past images, and
the student vector is compared with them. The response of a channel is its part in that similarity. Channels with low
responses in all comparisons are unimportant (Xie et al. 2023). Cost: the parameters and FLOPs of a detector at given
channel widths, computed without building the network.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.surgery import PrunableLayer
from hkd_det.models.zoo import ModelComplexity, count_params_and_flops

CHUNK_SIZE = 64  # similarities per chunk in the top-k search
EMA_DECAY = 0.9  # decay of the mean response per comparison
MAX_NEGATIVE_IOU = 0.3  # largest IoU of a background box with persons and ignore regions


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of unit vectors in half precision. Similarity needs only their directions.

    Args:
        size: Maximum number of vectors.
        channels: Length C of a vector.

    Attributes:
        vectors (half Tensor[Q, C]): The vectors, oldest first.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.vectors = torch.zeros(0, channels, dtype=torch.float16)

    def add(self, vectors: Tensor) -> None:
        """Append vectors and drop the oldest ones.

        Args:
            vectors (Tensor[N, C]): Vectors of any length; they are normalized.
        """
        normalized = F.normalize(vectors.float(), dim=1).half()
        self.vectors = torch.cat([self.vectors.to(normalized.device), normalized])[-self.size :]

    def find_nearest(self, queries: Tensor, k: int) -> Tensor:
        """Return the vectors with the highest cosine similarity to each query.

        Args:
            queries (Tensor[N, C]): Vectors of any length.
            k: Vectors per query.

        Returns:
            Tensor[N, K, C], most similar first; K is less than `k` if the queue is smaller.
        """
        vectors = self.vectors.to(queries.device, queries.dtype)
        similarity = F.normalize(queries, dim=1) @ vectors.T  # [N, Q]
        return vectors[_chunked_topk(similarity, min(k, len(vectors)))]

    def get_extra_state(self) -> Tensor:
        """Return the vectors as part of the state dict. An exact resume needs them."""
        return self.vectors

    def set_extra_state(self, state: Any) -> None:
        """Restore the vectors of a state dict.

        Args:
            state: Value of `get_extra_state`.
        """
        self.vectors = state


@dataclass(frozen=True, eq=False)
class PooledFeatures:
    """Pooled vectors of one layer and one batch, without gradients.

    Attributes:
        teacher (Tensor[R, C_teacher]): Vectors of the R regions, persons first, then background boxes.
        student (Tensor[N, C]): Vectors of the N persons, behind the compactor, in the order of `teacher`.
    """

    teacher: Tensor
    student: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence["PooledFeatures"]) -> "PooledFeatures":
        """Concatenate the vectors of several processes, so that the persons of all of them come first.

        Args:
            parts: Vectors of each process; at least one.

        Returns:
            The vectors of all persons, then those of all background boxes.
        """
        persons = [part.teacher[: len(part.student)] for part in parts]
        background = [part.teacher[len(part.student) :] for part in parts]
        return cls(torch.cat([*persons, *background]), torch.cat([part.student for part in parts]))


class ChannelImportance(nn.Module):
    """Running importance of the channels of one layer.

    Args:
        channels: Channels C of the student layer.
        teacher_channels: Channels of the teacher layer.
        queue_size: Teacher vectors to keep.
        num_neighbors: Teacher vectors that each person is compared with.
        candidate_ratio: Ratio of the channels that a comparison marks as low, masked ones included.

    Attributes:
        queue: Teacher vectors of past batches.
        response (Tensor[C]): Exponential moving average of the responses over persons and neighbors.
    """

    response: Tensor

    def __init__(
        self, channels: int, teacher_channels: int, queue_size: int, num_neighbors: int, candidate_ratio: float
    ) -> None:
        super().__init__()
        self.num_neighbors, self.candidate_ratio = num_neighbors, candidate_ratio
        self.queue = FeatureQueue(queue_size, teacher_channels)
        self.register_buffer("response", torch.zeros(channels))

    @torch.no_grad()
    def update(self, features: PooledFeatures, adapter: Tensor | None, masked: Tensor) -> Tensor:
        """Add a batch to the queue and to the mean response, and find its unimportant channels.

        The query of a person is its teacher vector, which is in the queue. One neighbor is therefore the person itself.
        With an adapter A, the neighbors t are projected back to A^T t. Because of <t, A s> = <A^T t, s>, the response
        |A^T t s| / ||s|| is still the part of each channel in the similarity.

        Args:
            features: Pooled vectors of the batch.
            adapter (Tensor[C_teacher, C]): Linear adapter, or None for equal widths.
            masked (bool Tensor[C]): Channels that are masked already.

        Returns:
            bool Tensor[C]: Channels that are unimportant in every comparison of this batch.
        """
        self.queue.add(features.teacher)
        if not len(features.student):
            return torch.zeros_like(masked)
        neighbors = self.queue.find_nearest(features.teacher[: len(features.student)], self.num_neighbors)
        responses = compute_channel_responses(features.student, neighbors if adapter is None else neighbors @ adapter)
        mean = responses.mean((0, 1))
        self.response.copy_(torch.lerp(mean, self.response, EMA_DECAY) if self.response.any() else mean)
        return find_unimportant_channels(responses, masked, self.candidate_ratio)

    def compute_relative_response(self, masked: Tensor) -> Tensor:
        """Divide the mean responses by their average over the remaining channels, to compare layers.

        Args:
            masked (bool Tensor[C]): Masked channels.

        Returns:
            Tensor[C].
        """
        remaining = self.response[~masked]
        return self.response / remaining.mean().clamp(min=torch.finfo(remaining.dtype).tiny)


def compute_channel_responses(student_vectors: Tensor, neighbors: Tensor) -> Tensor:
    """Compute the responses r = |t s| / ||s||: the part of each channel in the similarity to the neighbors.

    Args:
        student_vectors (Tensor[N, C]): Pooled student vectors behind the compactor, of any length.
        neighbors (Tensor[N, K, C]): Nearest teacher vectors, in the channels of the student.

    Returns:
        Tensor[N, K, C], at least 0.
    """
    return (neighbors * F.normalize(student_vectors, dim=1)[:, None]).abs()


def find_unimportant_channels(responses: Tensor, masked: Tensor, candidate_ratio: float) -> Tensor:
    """Find the channels that are among the lowest responses in every comparison.

    Masked channels count as the lowest and are not returned again. Masked and returned channels together are therefore
    at most `candidate_ratio` of a layer.

    Args:
        responses (Tensor[N, K, C]): Responses of N persons with K neighbors each.
        masked (bool Tensor[C]): Channels that are masked already.
        candidate_ratio: Ratio of the layer's channels that a comparison marks as low, masked ones included.

    Returns:
        bool Tensor[C]; all False without a comparison.
    """
    remaining = (~masked).nonzero()[:, 0]
    comparisons = responses.flatten(0, 1)[:, remaining]  # [N K, remaining]
    unimportant = masked.new_zeros(len(masked))
    num_lowest = int(candidate_ratio * len(masked)) - int(masked.sum())
    if len(comparisons) and num_lowest > 0:
        lowest = comparisons.topk(num_lowest, largest=False).indices
        is_low = comparisons.new_zeros(comparisons.shape).scatter_(1, lowest, 1)
        unimportant[remaining] = is_low.bool().all(0)
    return unimportant


@dataclass(frozen=True, eq=False)
class SampledRegions:
    """Regions of a batch: the persons, then at most as many background boxes.

    Attributes:
        rois (Tensor[R, 5]): Image index and xyxy box, input pixels.
        num_gt: Number of persons; they come first.
    """

    rois: Tensor
    num_gt: int


def sample_regions(targets: Targets, input_hw: tuple[int, int], has_negatives: bool = True) -> SampledRegions:
    """Collect the persons of a batch and sample a background box of the same size for each.

    A background box that overlaps a person or an ignore region by more than `MAX_NEGATIVE_IOU` is dropped.

    Args:
        targets: Targets of the batch.
        input_hw: Height and width of the input, pixels.
        has_negatives: Whether to sample background boxes.

    Returns:
        The regions.
    """
    gt_boxes, ignore_boxes = targets.split_ignored()
    rois = [_boxes_to_rois(gt_boxes)]
    if has_negatives:
        negatives = [
            _sample_negatives(boxes, torch.cat([boxes, ignored]), input_hw)
            for boxes, ignored in zip(gt_boxes, ignore_boxes, strict=True)
        ]
        rois.append(_boxes_to_rois(negatives))
    return SampledRegions(torch.cat(rois), len(rois[0]))


def _chunked_topk(values: Tensor, k: int) -> Tensor:
    """Return the indices [N, k] of the k highest values of [N, Q], descending.

    The k highest values are in the k chunks with the highest maxima. This search takes a quarter of the time of
    `torch.topk` on a CPU.
    """
    padded = F.pad(values, (0, -values.shape[1] % CHUNK_SIZE), value=-torch.inf)
    chunks = padded.reshape(len(values), padded.shape[1] // CHUNK_SIZE, CHUNK_SIZE)
    best_chunks = chunks.amax(2).topk(min(k, chunks.shape[1]), dim=1).indices  # [N, up to k]
    columns = (best_chunks[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE, device=values.device)).flatten(1)
    candidates = chunks.gather(1, best_chunks[..., None].expand(-1, -1, CHUNK_SIZE)).flatten(1)
    return columns.gather(1, candidates.topk(k, dim=1).indices)


def _sample_negatives(boxes: Tensor, occupied_boxes: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Move boxes [N, 4] to random positions inside the image and drop those that overlap occupied boxes."""
    size = boxes[:, 2:] - boxes[:, :2]
    max_corner = (boxes.new_tensor([input_hw[1], input_hw[0]]) - size).clamp(min=0)
    corner = torch.rand(len(boxes), 2, device=boxes.device) * max_corner
    moved = torch.cat([corner, corner + size], 1)
    return moved[(box_iou(moved, occupied_boxes) <= MAX_NEGATIVE_IOU).all(1)]


def _boxes_to_rois(boxes_per_image: Sequence[Tensor]) -> Tensor:
    """Concatenate boxes [N_i, 4] of each image to rois [sum N_i, 5] with the image index in front."""
    image_index = torch.cat([torch.full_like(boxes[:, :1], index) for index, boxes in enumerate(boxes_per_image)])
    return torch.cat([image_index, torch.cat(list(boxes_per_image))], 1)


class ChannelCostModel:
    """Computes the exact complexity of a detector at given widths of its prunable layers.

    `compute_complexity(widths)` equals `count_params_and_flops` of the network that is built with these widths.

    Args:
        detector: A detector without compactors.
        layers: The layers whose widths vary. They must run in inference.
        imgsz_hw: Input height and width, pixels.

    Attributes:
        widths: Output channels of `layers` in `detector`.
        initial_complexity: Complexity of `detector`.
    """

    def __init__(self, detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]) -> None:
        modules = dict(detector.named_modules())
        num_positions = _count_positions(detector, imgsz_hw)
        output_layers = {layer.conv: index for index, layer in enumerate(layers)}
        input_layers: dict[str, dict[int, int]] = {}
        for index, layer in enumerate(layers):
            for name in layer.consumers:
                input_layers.setdefault(name, {})[index] = layer.num_copies
        depthwise = {between.conv: index for index, layer in enumerate(layers) for between in layer.depthwise}
        norms = {layer.conv: layer.norms for layer in layers}
        for layer in layers:
            norms |= {between.conv: (between.norm,) for between in layer.depthwise}
        self._convs = []
        # Convolutions that do not run in inference, such as a head that is used in training only, cost nothing.
        for name in [name for name in output_layers | input_layers | depthwise if num_positions[name]]:
            module = modules[name]
            assert isinstance(module, nn.Conv2d)
            params_per_channel = (module.bias is not None) + sum(
                len(list(modules[norm].parameters(recurse=False))) for norm in norms.get(name, ())
            )
            copies = input_layers.get(name, {})
            variable_inputs = sum(count * modules[layers[index].conv].out_channels for index, count in copies.items())
            self._convs.append(
                _ConvCost(
                    copies,
                    output_layers.get(name, depthwise.get(name)),
                    1 if name in depthwise else module.in_channels - variable_inputs,
                    module.out_channels,
                    module.kernel_size[0] * module.kernel_size[1],
                    num_positions[name],
                    params_per_channel,
                )
            )
        self.widths = [int(modules[layer.conv].out_channels) for layer in layers]
        self.initial_complexity = count_params_and_flops(detector, imgsz_hw)
        num_params, flops = self._sum_convs(self.widths)
        self._fixed_cost = self.initial_complexity.num_params - num_params, self.initial_complexity.flops - flops

    def compute_complexity(self, widths: Sequence[int]) -> ModelComplexity:
        """Compute the complexity of the network with these widths.

        Args:
            widths: Output channels, in the order of `layers`.

        Returns:
            Parameters and FLOPs of the whole network.
        """
        num_params, flops = self._sum_convs(widths)
        return ModelComplexity(
            self._fixed_cost[0] + num_params, self._fixed_cost[1] + flops, self.initial_complexity.imgsz_hw
        )

    def compute_savings(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Compute what one channel less in a layer saves, at given widths of all layers.

        Args:
            widths: Output channels, in the order of `layers`; at least 1.

        Returns:
            Parameters and FLOPs that one channel of each layer costs.
        """
        params, flops = self._sum_convs(widths)
        savings = []
        for layer in range(len(widths)):
            smaller = self._sum_convs([width - (index == layer) for index, width in enumerate(widths)])
            savings.append((params - smaller[0], flops - smaller[1]))
        return savings

    def _sum_convs(self, widths: Sequence[int]) -> tuple[int, int]:
        num_params, flops = zip(*(conv.compute(widths) for conv in self._convs), strict=True)
        return sum(num_params), sum(flops)


def filter_deployed_layers(
    detector: BaseDetector, layers: Sequence[PrunableLayer], imgsz_hw: tuple[int, int]
) -> list[PrunableLayer]:
    """Return the layers that run in inference.

    Args:
        detector: The detector that contains the layers.
        layers: Candidates.
        imgsz_hw: Input height and width, pixels.

    Returns:
        The layers whose convolution runs in `detector.predict`.
    """
    num_positions = _count_positions(detector, imgsz_hw)
    return [layer for layer in layers if num_positions[layer.conv]]


@dataclass(frozen=True)
class _ConvCost:
    """A convolution with a variable number of channels.

    Attributes:
        input_layers: Layers whose channels are inputs, by index, with the number of copies of them.
        output_layer: Index of the layer whose width is the number of output channels; None if it is fixed.
        fixed_inputs: Input channels per output channel that do not vary; 1 for a depthwise convolution.
        out_channels: Output channels in the initial network.
        kernel_area: Weights per pair of an input and an output channel.
        num_positions: Output positions per image, summed over all calls.
        params_per_channel: Parameters of bias and normalizations per output channel.
    """

    input_layers: dict[int, int]
    output_layer: int | None
    fixed_inputs: int
    out_channels: int
    kernel_area: int
    num_positions: int
    params_per_channel: int

    def compute(self, widths: Sequence[int]) -> tuple[int, int]:
        """Return the number of parameters and FLOPs at these widths."""
        in_channels = self.fixed_inputs + sum(count * widths[index] for index, count in self.input_layers.items())
        out_channels = self.out_channels if self.output_layer is None else widths[self.output_layer]
        num_weights = in_channels * out_channels * self.kernel_area
        return num_weights + out_channels * self.params_per_channel, 2 * num_weights * self.num_positions


@torch.no_grad()
def _count_positions(detector: BaseDetector, imgsz_hw: tuple[int, int]) -> Counter[str]:
    """Count the output positions of every convolution for one image in inference, summed over all calls."""
    counts: Counter[str] = Counter()
    convs = [name for name, module in detector.named_modules() if isinstance(module, nn.Conv2d)]

    def count(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[name] += output.shape[-2] * output.shape[-1]

    was_training = detector.training
    try:
        with observe_calls(detector, convs, on_output=count):
            detector.eval().predict(torch.zeros(1, 3, *imgsz_hw, device=next(detector.parameters()).device))
    finally:
        detector.train(was_training)
    return counts
