"""The kinds of output that detectors of different families give."""

from hkd_det.models.prediction import DenseOutputs, DetectionBatch, ProposalOutputs

ModelOutputs = DenseOutputs | ProposalOutputs | DetectionBatch
