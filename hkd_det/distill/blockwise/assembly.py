"""Assembly: the teacher's network with learnt blocks in the place of its convolutions."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from hkd_det.models.families import build
from hkd_det.models.family import PersonDetector

Weights = Mapping[str, Tensor]


def assembled(teacher: PersonDetector, blocks: Mapping[str, Weights], layers: Iterable[str]) -> PersonDetector:
    """A new network, in evaluation mode on the teacher's device: the teacher with the blocks of these layers.

    blocks: each layer's weights by their names in the network; what no block brings is the teacher's.
    """
    chosen = tuple(layers)
    changes = replace(teacher.changes, separable=(*teacher.changes.separable, *chosen))
    network = build(teacher.spec, changes)
    wanted = network.state_dict()
    state = {name: value for name, value in teacher.state_dict().items() if name in wanted}
    for layer in chosen:
        state |= blocks[layer]
    network.load_state_dict(state)
    return network.to(next(teacher.parameters()).device).eval()
