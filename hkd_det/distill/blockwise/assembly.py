"""Assembly: the teacher's network with learnt blocks in the place of its convolutions."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hkd_det.models.families import build_from_spec
from hkd_det.models.family import BaseDetector

StateDict = Mapping[str, Tensor]


def assemble(teacher: BaseDetector, blocks: Mapping[str, StateDict]) -> BaseDetector:
    """A new network, in evaluation mode on the teacher's device: the teacher with blocks in place of some layers.

    blocks: by layer, weights by their names in the network; what no block brings is the teacher's.
    """
    changes = replace(teacher.changes, separable=(*teacher.changes.separable, *blocks))
    network = build_from_spec(teacher.spec, changes)
    wanted = network.state_dict()
    state = {name: value for name, value in teacher.state_dict().items() if name in wanted}
    for block in blocks.values():
        state |= block
    network.load_state_dict(state)
    return network.to(next(teacher.parameters()).device).eval()
