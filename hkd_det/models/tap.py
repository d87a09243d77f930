"""Tap: a layer of a network whose map is worth looking at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureInfo:
    """A layer worth recording: its module name, the stride of its map in input pixels, and its channels."""

    name: str
    stride: int
    channels: int
