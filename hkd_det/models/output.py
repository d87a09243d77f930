"""The kinds of output that detectors of different families give."""

from hkd_det.models.prediction import Found, Prediction, TwoStage

Output = Prediction | TwoStage | Found
