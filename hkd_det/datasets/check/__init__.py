"""`hkd-train --data X --check`: what a data set holds and what is wrong with it, before anything is trained."""

from hkd_det.datasets.check.command import check_dataset

__all__ = ["check_dataset"]
