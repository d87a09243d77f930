"""Evidence: what one layer's vectors have told so far of the use of its channels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.distill.capacity.gallery import Gallery
from hkd_det.distill.capacity.response import responses, unneeded
from hkd_det.distill.capacity.settings import CapacityDynamic

MEMORY = 0.9  # of the running response, a comparison with people


@dataclass(frozen=True, eq=False)
class Seen:
    """One layer's pooled vectors of a batch, without gradients.

    teacher: [R, C_teacher], people first, then distractors. student: [N, C] of the people, behind the compactor.
    """

    teacher: Tensor
    student: Tensor


class Evidence(nn.Module):
    """The layer's gallery and its channels' mean responses.

    response: [C] running mean over people and their neighbours.
    """

    response: Tensor

    def __init__(self, settings: CapacityDynamic, channels: int, teachers: int) -> None:
        super().__init__()
        self.settings = settings
        self.gallery = Gallery(settings.gallery, teachers)
        self.register_buffer("response", torch.zeros(channels))

    @torch.no_grad()
    def look(self, seen: Seen, adapter: Tensor | None, masked: Tensor) -> Tensor:
        """[C] bool: channels that every comparison of this batch finds unneeded; takes the batch up.

        adapter: [C_teacher, C] A where widths differ. Then people are compared as A s, and the neighbours' vectors
        pulled back to A^T t: <t, A s> = <A^T t, s>, so |A^T t s| is each channel's part in the likeness again.
        """
        self.gallery.add(seen.teacher)
        if not len(seen.student):
            return torch.zeros_like(masked)
        queries = seen.student if adapter is None else seen.student @ adapter.T
        neighbours = self.gallery.nearest(queries, self.settings.neighbours)
        response = responses(seen.student, neighbours if adapter is None else neighbours @ adapter)
        mean = response.mean((0, 1))
        self.response.copy_(torch.lerp(mean, self.response, MEMORY) if self.response.any() else mean)
        return unneeded(response, masked, self.settings.lowest)

    def relative(self, masked: Tensor) -> Tensor:
        """[C] running responses over the mean of the layer's remaining channels: comparable between layers."""
        left = self.response[~masked]
        return self.response / left.mean().clamp(min=torch.finfo(left.dtype).tiny)
