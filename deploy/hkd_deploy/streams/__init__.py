"""Where frames come from: a picture, a folder of pictures, a film, a webcam, a network camera.

with open_source("rtsp://camera/stream") as source:
    for frame_rgb, timestamp_s in source:
        ...
"""

from hkd_deploy.streams.source import Frame, FrameSource, open_source

__all__ = ["Frame", "FrameSource", "open_source"]
