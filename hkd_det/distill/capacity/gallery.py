"""Gallery: the teacher's pooled vectors of the last people and distractors it saw, of one layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
