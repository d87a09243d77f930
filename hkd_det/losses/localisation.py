"""Localisation distillation (LD, Zheng et al. 2022): a student's side distributions learn the teacher's."""

from torch import Tensor
from torch.nn import functional as F


def localization_distillation_loss(
    student_box_logits: Tensor, teacher_box_logits: Tensor, temperature: float = 2.0
) -> Tensor:
    """[...] KL divergence of [..., 4, bins] logits at a temperature, summed over bins, averaged over the four sides."""
    student = F.log_softmax(student_box_logits / temperature, -1)
    teacher = F.log_softmax(teacher_box_logits.detach() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean(-1) * temperature**2
