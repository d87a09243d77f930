"""Operations on tensors that know no model: boxes, suppression, RoI pooling, losses and hooks. Needs torch."""
