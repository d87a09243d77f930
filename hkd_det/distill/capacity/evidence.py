"""Evidence: what one layer's vectors have told so far of the use of its channels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.distill.capacity.gallery import FeatureQueue
from hkd_det.distill.capacity.response import channel_responses, unimportant_channels
from hkd_det.distill.capacity.settings import CDDConfig

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
