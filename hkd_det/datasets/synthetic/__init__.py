"""The embedded default: a drawn street with people, written as CityPersons would be. numpy and OpenCV only."""

from hkd_det.datasets.synthetic.clip import write_clip
from hkd_det.datasets.synthetic.scene import Street, draw_street
from hkd_det.datasets.synthetic.writer import write_street

__all__ = ["Street", "draw_street", "write_clip", "write_street"]
