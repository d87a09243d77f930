"""Capacity-dynamic distillation: the method's settings, `distill: cdd:` of a recipe.

What the teacher asks of a capacity-dynamic student: its scores, and people's vectors inside every block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hkd_det.distill.base import DistillationBatch, sample_rois
from hkd_det.distill.cdd.compactor import CompactorSite, find_compactors
from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.cdd.importance import ChannelImportance, PooledFeatures, sample_regions
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DenseOutputs, ProposalOutputs
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.ops.hooks import FeatureHooks
from hkd_det.ops.losses import quality_focal_kd_loss
from hkd_det.ops.roi_pool import BoxAveragePool

MAX_ROIS = 64  # of a two-stage teacher, whose scores are learnt beside those of the true boxes


class CDD(nn.Module):
    """The terms `cdd_score` and `cdd_feature`. Its parameters are adapters where widths differ.

    looks: whether the next lesson is to show what channels are chosen by. seen: what the last one showed, a layer each;
    empty when it was not to, or when there was none.
    """

    def __init__(self, student: BaseDetector, teacher: BaseDetector, config: CDDConfig) -> None:
        """Raises UsageError unless the teacher has all the layers that the student is to shed channels of."""
        super().__init__()
        sites = find_compactors(student)
        _check_same_layers(sites, student, teacher)
        self.config = config
        self.sites = tuple(sites)  # no submodules: they are the student's
        names = [name for site in sites for name in site.layer.norms]
        self._student_hooks = FeatureHooks(student, [f"{name}.norm" for name in names])
        # Activations after the teacher's normalisations work in place and would overwrite what is recorded.
        self._teacher_hooks = FeatureHooks(teacher, names, clone=True)
        self.adapters = nn.ModuleList(_make_adapter(site, teacher) for site in sites)
        self.importance = nn.ModuleList(
            ChannelImportance(config, len(site.compactor.masked), _get_teacher_channels(site, teacher))
            for site in sites
        )
        self.is_comparison_step = True
        self.pooled_features: list[PooledFeatures] = []

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms, each a scalar."""
        height, width = batch.images.shape[-2:]
        regions = sample_regions(batch.targets, (height, width), has_negatives=self.is_comparison_step)
        people = regions.rois[: regions.num_gt]
        of_people = BoxAveragePool(people, (height, width))
        of_all = BoxAveragePool(regions.rois, (height, width)) if self.is_comparison_step else of_people
        norm = batch.reduce_mean(torch.tensor(float(len(people)), device=people.device))
        distances = batch.images.new_zeros((), dtype=torch.float32)
        self.pooled_features = []
        mine, other = iter(self._student_hooks.pop()), iter(self._teacher_hooks.pop())
        for site, adapter in zip(self.sites, self.adapters, strict=True):
            levels = range(len(site.layer.norms))
            student = of_people([next(mine) for _ in levels])
            teacher = of_all([next(other) for _ in levels])
            distances = distances + _compute_l2_distances(adapter(student), teacher[: len(people)]).sum() / norm
            if self.is_comparison_step:
                with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
                    self.pooled_features.append(PooledFeatures(teacher, site.compactor.apply_to_vectors(student)))
        return {
            "cdd_feature": self.config.feature * distances,
            "cdd_cls": self.config.cls * self._compute_cls_loss(batch),
        }

    def update_importance(self, layer: int, features: PooledFeatures) -> Tensor:
        """[C] bool: what all people agree that a layer does not need. See `Evidence.look`."""
        adapter, evidence = self.adapters[layer], self.importance[layer]
        assert isinstance(evidence, ChannelImportance)
        projection = adapter.weight.detach() if isinstance(adapter, nn.Linear) else None
        return evidence.update(features, projection, self.sites[layer].compactor.masked)

    def compute_relative_response(self, layer: int) -> Tensor:
        """[C] a layer's responses, comparable between layers."""
        evidence = self.importance[layer]
        assert isinstance(evidence, ChannelImportance)
        return evidence.compute_relative_response(self.sites[layer].compactor.masked)

    def clear(self) -> None:
        """Let go of what was recorded in a step that is not distilled."""
        self._student_hooks.pop()
        self.pooled_features = []

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_hooks.close()
        self._teacher_hooks.close()

    def _compute_cls_loss(self, batch: DistillationBatch) -> Tensor:
        student, teacher = batch.student_outputs, batch.teacher_outputs
        if self.config.cls == 0:
            return batch.images.new_zeros((), dtype=torch.float32)
        if isinstance(student, ProposalOutputs) and isinstance(teacher, ProposalOutputs):
            return self._compute_roi_cls_loss(batch, student, teacher)
        assert isinstance(student, DenseOutputs) and isinstance(teacher, DenseOutputs)
        loss = student.one2many.logits.new_zeros(())
        for mine, other in ((student.one2many, teacher.one2many), (student.one2one, teacher.one2one)):
            if mine is not None and other is not None:
                norm = batch.reduce_mean(other.logits.sigmoid().sum())
                loss = loss + self._compute_kd_loss(mine.logits, other.logits).sum() / norm
        return loss

    def _compute_roi_cls_loss(
        self, batch: DistillationBatch, student_outputs: ProposalOutputs, teacher_outputs: ProposalOutputs
    ) -> Tensor:
        assert isinstance(batch.student, FasterRCNN) and isinstance(batch.teacher, FasterRCNN)
        regions = sample_rois(batch, teacher_outputs, MAX_ROIS)
        answer = batch.student.forward_rois(student_outputs, regions)
        with torch.no_grad():
            wanted = batch.teacher.forward_rois(teacher_outputs, regions)
        count = torch.tensor(float(len(answer.logits)), device=answer.logits.device)
        return self._compute_kd_loss(answer.logits, wanted.logits).sum() / batch.reduce_mean(count)

    def _compute_kd_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """T^2 times the divergence of scores at temperature T: its gradient's size does not depend on T (Hinton)."""
        temperature = self.config.temperature
        return temperature**2 * quality_focal_kd_loss(student_logits / temperature, teacher_logits / temperature)


def _check_same_layers(sites: Sequence[CompactorSite], student: BaseDetector, teacher: BaseDetector) -> None:
    if type(teacher) is not type(student):
        raise UsageError("--distill cdd compares inner layers: its teacher must be of the student's own family")
    theirs = {(layer.conv, layer.norms) for layer in teacher.prunable_layers()}
    for site in sites:
        if (site.layer.conv, site.layer.norms) not in theirs:
            raise UsageError(
                f"--distill cdd: the teacher has no layer {site.layer.conv}; leave --model out to start as the teacher"
            )


def _make_adapter(site: CompactorSite, teacher: BaseDetector) -> nn.Module:
    mine, other = len(site.compactor.masked), _get_teacher_channels(site, teacher)
    return nn.Identity() if mine == other else nn.Linear(mine, other, bias=False)


def _get_teacher_channels(site: CompactorSite, teacher: BaseDetector) -> int:
    return int(teacher.get_submodule(site.layer.conv).out_channels)  # type: ignore[arg-type]


def _compute_l2_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] Euclidean distances of [N, C]; at 0 the gradient is 0, not NaN."""
    return torch.linalg.vector_norm(student - teacher, dim=1)
