"""Synthetic street scenes with persons, written in the CityPersons layout."""

from hkd_det.datasets.synthetic.scene import RenderedScene, generate_scene
from hkd_det.datasets.synthetic.writer import write_synthetic_dataset, write_video

__all__ = ["RenderedScene", "generate_scene", "write_synthetic_dataset", "write_video"]
