"""Track ids for the detections of one camera, by BoT-SORT of the package `trackers` (extra `track`).

BoT-SORT (Aharon et al., 2022, https://arxiv.org/abs/2206.14651) predicts the box of each track with a Kalman filter,
whose noise is proportional to the box, and assigns detections to the predictions by IoU: first those with a high score,
then, as ByteTrack does, those with a low score. Without the compensation of camera motion, it needs no image.
"""

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import import_package
from hkd_det.structures import Detections

INSTALL_HINT = "Run pip install 'hkd-det[track]'."
NO_TRACK = -1
MIN_CONFIRMED_FRAMES = 2  # with a detection, before a track has an id
MIN_IOU = 0.15  # between a detection and a predicted box; low, because boxes move far at few frames per second
MIN_LOW_SCORE_IOU = 0.3
LOW_SCORE_RATIO = 0.4  # of `min_score`: detections with lower scores do not continue a track
LIBRARY_FPS = 30.0  # unit of `lost_track_buffer`
REFERENCE_FPS = 12.5  # noise of the Kalman filter: smoother for lower rates. Intervals are measured in seconds.
MIN_INTERVAL_S = 1e-3
# The library multiplies IoU by the score. With two values, the limits of IoU do not depend on the score.
HIGH_SCORE, LOW_SCORE = 1.0, 0.2


class PersonTracker:
    """Tracker of one camera. Frames may be skipped: all times are measured in seconds.

    Args:
        min_score: Minimum score of a detection that starts a track, 0 to 1: the score from which boxes are drawn.
        max_lost_s: Time that a track survives without a detection, seconds. After a longer gap between two frames, such
            as the loss of a camera, all tracks start again. Ids are not used twice.

    Attributes:
        min_score: As above. It may be changed between two frames; tracks go on.

    Raises:
        UnavailableError: The package `trackers` is not installed.
    """

    def __init__(self, min_score: float, max_lost_s: float = 1.5) -> None:
        library = import_package("trackers", hint=INSTALL_HINT)
        self._supervision = import_package("supervision", hint=INSTALL_HINT)
        self.min_score, self._max_lost_s = min_score, max_lost_s
        self._tracker = library.BoTSORTTracker(
            lost_track_buffer=round(LIBRARY_FPS * max_lost_s),
            frame_rate=REFERENCE_FPS,
            track_activation_threshold=HIGH_SCORE,
            high_conf_det_threshold=HIGH_SCORE,
            minimum_consecutive_frames=MIN_CONFIRMED_FRAMES,
            minimum_iou_threshold_first_assoc=MIN_IOU,
            minimum_iou_threshold_second_assoc=MIN_LOW_SCORE_IOU,
            minimum_iou_threshold_unconfirmed_assoc=MIN_IOU,
            instant_first_frame_activation=False,
            enable_cmc=False,
        )
        self._last_s: float | None = None
        self._image_hw = (0, 0)
        self._first_id = 1  # id of the first track since the last reset
        self._last_id = 0

    def update(self, detections: Detections, image_hw: tuple[int, int], timestamp_s: float) -> NDArray[np.int64]:
        """Assign the detections of the next frame to tracks.

        Pass the detections with low scores too: they continue tracks of people who are partly hidden.

        Args:
            detections: Detections of the frame.
            image_hw: Height and width of the frame, pixels. The tracks are reset if it changes.
            timestamp_s: Time of the frame, seconds. A time before that of the previous frame, as from a video that
                starts again, resets the tracks.

        Returns:
            int64[N]: Track id of each detection, from 1. -1 for a detection without a confirmed track.
        """
        if image_hw != self._image_hw:
            self.reset()
            self._image_hw = image_hw
        if self._last_s is not None:
            if not 0 <= timestamp_s - self._last_s <= self._max_lost_s:
                self.reset()
            elif timestamp_s - self._last_s < MIN_INTERVAL_S:
                timestamp_s = self._last_s + MIN_INTERVAL_S
        self._last_s = timestamp_s
        track_ids = np.full(len(detections), NO_TRACK, np.int64)
        rows = np.flatnonzero(detections.scores >= LOW_SCORE_RATIO * self.min_score)
        result = self._tracker.update(
            self._supervision.Detections(
                xyxy=detections.boxes_xyxy[rows].astype(np.float64),
                confidence=np.where(detections.scores[rows] >= self.min_score, HIGH_SCORE, LOW_SCORE),
                data={"row": rows},
            ),
            timestamp=timestamp_s,
        )
        if len(result):  # in another order
            ids = np.asarray(result.tracker_id, np.int64)
            track_ids[result.data["row"]] = np.where(ids >= 0, ids + self._first_id, NO_TRACK)
            self._last_id = max(self._last_id, int(track_ids.max()))
        return track_ids

    def reset(self) -> None:
        """End all tracks. Later tracks have new ids."""
        self._tracker.reset()
        self._last_s = None
        self._first_id = self._last_id + 1
