"""`hkd-train --data X --check`: what a data set holds and what is wrong with it, before anything is trained."""

__all__ = ["check_dataset"]
