"""Learning a teacher's scores: binary cross-entropy where student and teacher disagree."""

import torch
from torch import Tensor
from torch.nn import functional as F

SCORE_EPS = 1e-4  # scores this near to 0 and 1 are no nearer: a black box may round


def quality_focal_kd_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """[...] BCE of the student's score s against the teacher's score t, weighted by |t - s|^power, not reduced.

    Sigmoid, never softmax: over one class a softmax is identically 1. The teacher's own entropy is
    subtracted, so that agreement costs 0.
    """
    target = teacher_logits.detach().sigmoid()
    with torch.no_grad():
        weight = (target - student_logits.sigmoid()).abs().pow(beta)
    cross = F.binary_cross_entropy_with_logits(student_logits, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_logits.detach(), target, reduction="none")
    return weight * (cross - entropy)
