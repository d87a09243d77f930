"""Importance of channels: how much each channel contributes to the similarity of persons to teacher features.

For every person the student vector is compared with its nearest teacher vectors in a queue of past images. The response
of a channel is its part in that similarity. Channels with low responses in all comparisons are unimportant (Xie et al.
2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from hkd_det.models.base import Targets

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
        student (Tensor[N, C]): Vectors of the N persons, behind the compactor.
    """

    teacher: Tensor
    student: Tensor


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

        With an adapter A, persons are compared as A s, and the neighbors t are projected back to A^T t. Because of
        <t, A s> = <A^T t, s>, the response |A^T t s| is still the part of each channel in the similarity.

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
        queries = features.student if adapter is None else features.student @ adapter.T
        neighbors = self.queue.find_nearest(queries, self.num_neighbors)
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
    """Compute the responses r = |t s|: the part of each channel in the similarity to the neighbors.

    Args:
        student_vectors (Tensor[N, C]): Pooled student vectors behind the compactor.
        neighbors (Tensor[N, K, C]): Nearest teacher vectors, in the channels of the student.

    Returns:
        Tensor[N, K, C], at least 0.
    """
    return (neighbors * student_vectors[:, None]).abs()


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
