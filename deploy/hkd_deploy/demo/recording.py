"""Recording of all cameras, and deletion of old files: `hkd-demo --record DIR`."""

import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Event, Thread

from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.camera_recorder import CLOSE_TIMEOUT_S, CameraRecorder, RecordingConfig
from hkd_deploy.demo.cameras import make_slugs
from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.fragmented_mp4 import TEMP_PREFIX, H264Encoder, cut_incomplete_fragment
from hkd_det.errors import UsageError

RETENTION_INTERVAL_S = 30.0
SEGMENT_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3}Z(_\d+)?\.mp4")


class Recorder:
    """Records all cameras, and deletes old files. It is a `FrameSink`.

    Args:
        config: What is recorded and how long it is kept.
        cameras: Names of the cameras, and whether they are live: frames of a live source are dropped while the encoder
            or the disk is too slow.
        report: Called with one line when recording stops or continues.

    Raises:
        UsageError: Files cannot be created in the directory.
        UnavailableError: PyAV is not installed or has no encoder.
    """

    def __init__(self, config: RecordingConfig, cameras: Mapping[str, bool], report: Report) -> None:
        H264Encoder((16, 16))  # raises an error before the first frame
        try:
            config.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.directory):
                pass
            repair_segments(config.directory)
        except OSError as error:
            raise UsageError(f"--record {config.directory}: {error.strerror}. Choose another directory.") from None
        self._config, self._report = config, report
        self._stop, self._wake = Event(), Event()
        self._recorders: dict[str, CameraRecorder] = {}
        for camera, is_live in cameras.items():
            self._add_camera(camera, is_live)
        self._thread = Thread(target=self._delete_old_files, name="retention", daemon=True)
        self._thread.start()

    @property
    def recorders(self) -> dict[str, CameraRecorder]:
        """The recorder of each camera. A camera that is added later makes a new mapping."""
        return self._recorders

    def write(self, result: FrameResult) -> None:
        """Record a frame without boxes, with people redacted if they are to be; see `FrameSink.write`."""
        recorder = self._recorders.get(result.camera) or self._add_camera(result.camera, result.age_ms is not None)
        recorder.write(result.image_rgb, result.timestamp_s, has_person=len(result.detections) > 0)

    def write_status(self, camera: str, status: str) -> None:
        """Do nothing: a pause of the camera ends the file."""

    def close(self) -> None:
        """Complete all files, at most for a second, and report frames that were not recorded."""
        threads = [Thread(target=recorder.close) for recorder in self._recorders.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._stop.set()
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        for camera, recorder in self._recorders.items():
            if recorder.num_dropped:
                total = recorder.num_frames + recorder.num_dropped
                text = f"--record: {recorder.num_dropped} of {total} frames were not recorded."
                self._report(text, camera, "warning")

    def _add_camera(self, camera: str, is_live: bool) -> CameraRecorder:
        directory = self._config.directory / make_slugs([*self._recorders, camera])[camera]
        recorder = CameraRecorder(directory, self._config, is_live, self._report, self._wake.set)
        self._recorders = {**self._recorders, camera: recorder}
        return recorder

    def _delete_old_files(self) -> None:
        """Body of the thread: delete old files at the start, after each segment and every 30 s."""
        config, last_error = self._config, ""
        while not self._stop.is_set():
            open_paths = {recorder.path for recorder in self._recorders.values()}
            try:
                delete_old_segments(config.directory, config.max_age_s, config.max_bytes, open_paths)
            except OSError as error:
                text = f"--record {error.filename}: {error.strerror}. Old files are not deleted."
                if text != last_error:
                    self._report(text, level="error")
                last_error = text
            self._wake.wait(RETENTION_INTERVAL_S)
            self._wake.clear()


def repair_segments(directory: Path) -> None:
    """Complete what a run left that was killed: files without a fragment, and the end of the newest file of a camera.

    Args:
        directory: Directory of `--record`.

    Raises:
        OSError: A file cannot be read or written.
    """
    for folder in (path for path in directory.iterdir() if path.is_dir()):
        names = [path.name for path in folder.glob("*.mp4")]
        for name in names:
            if name.startswith(TEMP_PREFIX) and SEGMENT_NAME.fullmatch(name.removeprefix(TEMP_PREFIX)):
                (folder / name).unlink()
        if segments := [name for name in names if SEGMENT_NAME.fullmatch(name)]:
            cut_incomplete_fragment(folder / max(segments))


def delete_old_segments(
    directory: Path, max_age_s: float | None, max_bytes: int | None, open_paths: Iterable[Path | None] = ()
) -> list[Path]:
    """Delete old recordings of all cameras, the oldest first. Other files are not touched.

    Args:
        directory: Directory of `--record`.
        max_age_s: Files that were last written longer ago are deleted, seconds. None keeps them.
        max_bytes: Largest size of all recordings together. None for no limit.
        open_paths: Files that are being written. They count and are not deleted.

    Returns:
        The deleted files.

    Raises:
        OSError: A file cannot be deleted.
    """
    if max_age_s is None and max_bytes is None:
        return []
    paths = [path for path in directory.glob("*/*.mp4") if SEGMENT_NAME.fullmatch(path.name)]
    stats = {path: path.stat() for path in sorted(paths, key=lambda path: path.name)}
    num_bytes, now_s = sum(stat.st_size for stat in stats.values()), time.time()
    deleted = []
    for path, stat in stats.items():
        is_too_old = max_age_s is not None and now_s - stat.st_mtime > max_age_s
        is_too_much = max_bytes is not None and num_bytes > max_bytes
        if (is_too_old or is_too_much) and path not in set(open_paths):
            path.unlink(missing_ok=True)
            num_bytes -= stat.st_size
            deleted.append(path)
    return deleted
