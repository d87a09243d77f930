"""Response: which of a layer's channels people do not need."""

from torch import Tensor


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
