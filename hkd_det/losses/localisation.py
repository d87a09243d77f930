"""Localisation distillation (LD, Zheng et al. 2022): a student's side distributions learn the teacher's."""

from torch import Tensor
from torch.nn import functional as F


def localisation_loss(student_sides: Tensor, teacher_sides: Tensor, temperature: float = 2.0) -> Tensor:
    """[...] KL divergence of [..., 4, bins] logits at a temperature, summed over bins, averaged over the four sides."""
    student = F.log_softmax(student_sides / temperature, -1)
    teacher = F.log_softmax(teacher_sides.detach() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean(-1) * temperature**2
