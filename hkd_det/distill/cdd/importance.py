"""Gallery: the teacher's pooled vectors of the last people and distractors it saw, of one layer.

Response: which of a layer's channels people do not need.

Evidence: what one layer's vectors have told so far of the use of its channels.

People and distractors as vectors: a layer's map averaged over a box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.models.base import Targets
from hkd_det.models.faster_rcnn import split_ignored

CHUNK_SIZE = 64  # vectors of the gallery, of whose likenesses the highest is found first


class FeatureQueue(nn.Module):
    """First in, first out. Vectors are kept with length 1, in half precision: only their directions are asked for."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.vectors = torch.zeros(0, channels, dtype=torch.float16)

    def add(self, vectors: Tensor) -> None:
        """Take up [N, C], letting go of the oldest."""
        fresh = F.normalize(vectors.float(), dim=1).half()
        self.vectors = torch.cat([self.vectors.to(fresh.device), fresh])[-self.size :]

    def find_nearest(self, queries: Tensor, k: int) -> Tensor:
        """[N, K, C] the vectors most alike in cosine to each of [N, C]; K is `count`, fewer in a smaller gallery."""
        known = self.vectors.to(queries.device, queries.dtype)
        likeness = F.normalize(queries, dim=1) @ known.T  # [N, G]
        return known[_chunked_topk(likeness, min(k, len(known)))]

    def get_extra_state(self) -> Tensor:
        """What an exact resume needs: saved with the module's state."""
        return self.vectors

    def set_extra_state(self, state: Any) -> None:
        """Take up what was saved."""
        self.vectors = state


def _chunked_topk(values: Tensor, k: int) -> Tensor:
    """[N, K] places of the `count` highest of [N, G], falling.

    They lie in the `count` blocks with the highest maxima, and to find those takes a CPU a quarter of the time.
    """
    filled = F.pad(values, (0, -values.shape[1] % CHUNK_SIZE), value=-torch.inf)
    blocks = filled.reshape(len(values), filled.shape[1] // CHUNK_SIZE, CHUNK_SIZE)
    best = blocks.amax(2).topk(min(k, blocks.shape[1]), dim=1).indices  # [N, up to K]
    places = (best[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE, device=values.device)).flatten(1)
    within = blocks.gather(1, best[..., None].expand(-1, -1, CHUNK_SIZE)).flatten(1).topk(k, dim=1).indices
    return places.gather(1, within)


def channel_responses(student_vectors: Tensor, neighbors: Tensor) -> Tensor:
    """[N, K, C] r = |t s|: how much each channel adds to a person's likeness to those nearest to it.

    students: [N, C] pooled vectors behind the compactor. neighbours: [N, K, C] of the teacher, in the same channels.
    """
    return (neighbors * student_vectors[:, None]).abs()


def unimportant_channels(responses: Tensor, masked: Tensor, candidate_ratio: float) -> Tensor:
    """[C] bool: channels among the layer's lowest share in every comparison; none where there was no comparison.

    response: [N, K, C]. masked: [C] bool, channels that went before: they are the lowest, and not named again. So
    agreement takes no more than the share of a layer, however long it goes on.
    """
    left = (~masked).nonzero()[:, 0]
    comparisons = responses.flatten(0, 1)[:, left]  # [N K, left]
    chosen = masked.new_zeros(len(masked))
    count = int(candidate_ratio * len(masked)) - int(masked.sum())
    if len(comparisons) and count > 0:
        marks = comparisons.new_zeros(comparisons.shape).scatter_(1, comparisons.topk(count, largest=False).indices, 1)
        chosen[left] = marks.bool().all(0)
    return chosen


EMA_DECAY = 0.9  # of the running response, a comparison with people


@dataclass(frozen=True, eq=False)
class PooledFeatures:
    """One layer's pooled vectors of a batch, without gradients.

    teacher: [R, C_teacher], people first, then distractors. student: [N, C] of the people, behind the compactor.
    """

    teacher: Tensor
    student: Tensor


class ChannelImportance(nn.Module):
    """The layer's gallery and its channels' mean responses.

    response: [C] running mean over people and their neighbours.
    """

    response: Tensor

    def __init__(self, config: CDDConfig, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.config = config
        self.queue = FeatureQueue(config.queue_size, teacher_channels)
        self.register_buffer("response", torch.zeros(channels))

    @torch.no_grad()
    def update(self, features: PooledFeatures, adapter: Tensor | None, masked: Tensor) -> Tensor:
        """[C] bool: channels that every comparison of this batch finds unneeded; takes the batch up.

        adapter: [C_teacher, C] A where widths differ. Then people are compared as A s, and the neighbours' vectors
        pulled back to A^T t: <t, A s> = <A^T t, s>, so |A^T t s| is each channel's part in the likeness again.
        """
        self.queue.add(features.teacher)
        if not len(features.student):
            return torch.zeros_like(masked)
        queries = features.student if adapter is None else features.student @ adapter.T
        neighbours = self.queue.find_nearest(queries, self.config.num_neighbors)
        response = channel_responses(features.student, neighbours if adapter is None else neighbours @ adapter)
        mean = response.mean((0, 1))
        self.response.copy_(torch.lerp(mean, self.response, EMA_DECAY) if self.response.any() else mean)
        return unimportant_channels(response, masked, self.config.candidate_ratio)

    def compute_relative_response(self, masked: Tensor) -> Tensor:
        """[C] running responses over the mean of the layer's remaining channels: comparable between layers."""
        left = self.response[~masked]
        return self.response / left.mean().clamp(min=torch.finfo(left.dtype).tiny)


MAX_NEGATIVE_IOU = 0.3  # IoU with people and ignore regions up to which a box is background


@dataclass(frozen=True, eq=False)
class SampledRegions:
    """Boxes of a batch: people first, then as many distractors at most, if any were drawn.

    rois: [R, 5] picture, xyxy in input pixels. people: how many of them are people.
    """

    rois: Tensor
    num_gt: int


def sample_regions(targets: Targets, input_hw: tuple[int, int], has_negatives: bool = True) -> SampledRegions:
    """The people, and, with `distractors`, for each a box of the same size at a place of chance, if there is nobody."""
    people, ignored = split_ignored(targets)
    rois = [_boxes_to_rois(people)]
    if has_negatives:
        moved = [
            _sample_negatives(boxes, torch.cat([boxes, left_out]), input_hw)
            for boxes, left_out in zip(people, ignored, strict=True)
        ]
        rois.append(_boxes_to_rois(moved))
    return SampledRegions(torch.cat(rois), len(rois[0]))


def _sample_negatives(boxes: Tensor, occupied_boxes: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """[N, 4] the boxes moved to places of chance inside the picture, without those that overlap a taken one."""
    size = boxes[:, 2:] - boxes[:, :2]
    room = (boxes.new_tensor([input_hw[1], input_hw[0]]) - size).clamp(min=0)
    corner = torch.rand(len(boxes), 2, device=boxes.device) * room
    moved = torch.cat([corner, corner + size], 1)
    return moved[(box_iou(moved, occupied_boxes) <= MAX_NEGATIVE_IOU).all(1)]


def _boxes_to_rois(boxes: Sequence[Tensor]) -> Tensor:
    picture = torch.cat([torch.full_like(of_one[:, :1], index) for index, of_one in enumerate(boxes)])
    return torch.cat([picture, torch.cat(list(boxes))], 1)
