"""Tests of recordings: what is in the files, SIGKILL, a full disk, retention, pre-roll, and privacy.

Each test image carries its number as a code of black and white blocks, so that a decoded frame can be identified.
"""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.camera_recorder import CameraRecorder, RecordingConfig, make_segment_path
from hkd_deploy.demo.fragmented_mp4 import FragmentedMp4, H264Encoder, cut_incomplete_fragment
from hkd_deploy.demo.recording import Recorder, delete_old_segments
from hkd_det.errors import UsageError
from hkd_det.structures import Detections

av = pytest.importorskip("av")
BLOCK_PX, NUM_BITS = 16, 12


def make_image(number: int, size_hw: tuple[int, int] = (120, 192)) -> NDArray[np.uint8]:
    image = np.full((*size_hw, 3), 90, np.uint8)
    for bit in range(NUM_BITS):
        image[:BLOCK_PX, bit * BLOCK_PX : (bit + 1) * BLOCK_PX] = 235 if number >> bit & 1 else 20
    return image


def read_number(image: NDArray[np.uint8]) -> int:
    blocks = [image[4:12, bit * BLOCK_PX + 4 : bit * BLOCK_PX + 12].mean() for bit in range(NUM_BITS)]
    return sum((block > 128) << bit for bit, block in enumerate(blocks))


def decode(path: Path) -> list[tuple[float, int]]:
    """Return time in seconds and number of each frame, decoded with PyAV."""
    with av.open(str(path)) as container:
        return [(frame.time, read_number(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)]


def decode_with_opencv(path: Path) -> list[int]:
    reader, numbers = cv2.VideoCapture(str(path)), []
    while (result := reader.read())[0]:
        numbers.append(read_number(result[1][..., ::-1]))
    return numbers


def list_boxes(data: bytes) -> list[tuple[str, int]]:
    """Return type and size of the boxes at the top level of an MP4 file. The last one may be incomplete."""
    boxes, offset = [], 0
    while offset + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[offset : offset + 8])
        boxes.append((kind.decode(), size))
        offset += size
    return boxes


def list_segments(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*/*.mp4") if not path.name.startswith("."))


class Recording:
    """A recorder without a camera: frames with given times, and the messages."""

    def __init__(self, directory: Path, is_live: bool = False, **settings: object) -> None:
        self.reports: list[str] = []
        config = RecordingConfig(directory, **settings)  # type: ignore[arg-type]
        self.recorder = CameraRecorder(
            directory / "door", config, is_live, lambda text, *_, **__: self.reports.append(text), lambda: None
        )

    def write(self, number: int, time_s: float, has_person: bool = False) -> None:
        self.recorder.write(make_image(number), time_s, has_person)


@pytest.mark.slow
def test_variable_frame_times_are_kept(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    rng = np.random.default_rng(0)
    times = 1000 + np.cumsum(rng.choice([0.01, 0.033, 0.2, 0.9, 2.5], 200)).round(3)
    for number, time_s in enumerate(times.tolist()):
        recording.write(number, time_s)
    recording.recorder.close()
    (path,) = list_segments(tmp_path)
    frames = decode(path)
    assert [number for _, number in frames] == list(range(200))
    np.testing.assert_allclose([time_s for time_s, _ in frames], times - times[0], atol=0.0011)
    assert decode_with_opencv(path) == list(range(200))
    assert recording.reports == []
    assert recording.recorder.num_frames == 200


def test_fragments_are_short_and_browsers_know_the_codec(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(150):
        recording.write(number, number / 15)
    recording.recorder.close()
    (path,) = list_segments(tmp_path)
    boxes = [kind for kind, _ in list_boxes(path.read_bytes())]
    assert boxes[:2] == ["ftyp", "moov"]
    assert boxes[2:-1] == ["moof", "mdat"] * (len(boxes[2:-1]) // 2)
    assert boxes.count("moof") >= 18  # 10 s in fragments of half a second and a frame
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        times = [packet.pts * stream.time_base for packet in container.demux(stream) if packet.is_keyframe]
    assert times[0] == 0
    assert max(np.diff([float(time_s) for time_s in times])) <= 1.07
    assert Fraction(0) <= 10 - times[-1] <= Fraction(11, 10)


def test_segments_follow_each_other_without_a_missing_frame(tmp_path: Path) -> None:
    recording = Recording(tmp_path, segment_s=2)
    for number in range(100):
        recording.write(number, 50 + number / 10)
    recording.recorder.close()
    paths = list_segments(tmp_path)
    assert len(paths) == 5
    frames = [decode(path) for path in paths]
    assert [number for part in frames for _, number in part] == list(range(100))
    assert all(part[0][0] == 0 for part in frames)


def test_pause_jump_and_new_size_begin_a_new_file(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    times = [*range(10), *range(20, 30), *range(5, 15)]  # a pause of 10 s, and a jump back of 24 s
    for number, time_s in enumerate(times):
        recording.write(number, float(time_s))
    for number in range(30, 35):
        recording.recorder.write(make_image(number, (241, 321)), number - 15.0, False)
    recording.recorder.close()
    parts = [decode(path) for path in list_segments(tmp_path)]
    assert sorted([number for _, number in part] for part in parts) == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
        list(range(30, 35)),
    ]


@pytest.mark.slow
def test_event_contains_the_time_before_and_after_the_person(tmp_path: Path) -> None:
    recording = Recording(tmp_path, only_persons=True, pre_roll_s=5, post_roll_s=3)
    with_person = [*range(200, 230), 600]
    for number in range(800):
        recording.write(number, number / 10, number in with_person)
    recording.recorder.close()
    first, second = ([number for _, number in decode(path)] for path in list_segments(tmp_path))
    assert 140 <= first[0] <= 150  # 5 s, and up to a second to the key frame
    assert first == list(range(first[0], 229 + 30 + 1))
    assert 540 <= second[0] <= 550
    assert second == list(range(second[0], 631))
    assert recording.recorder.num_dropped == 0


def test_no_person_no_file(tmp_path: Path) -> None:
    recording = Recording(tmp_path, only_persons=True)
    for number in range(100):
        recording.write(number, number / 10)
    recording.recorder.close()
    assert list(tmp_path.iterdir()) == []


RECORD_UNTIL_KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_recording import Recording
recording = Recording(Path(sys.argv[2]), is_live=True, segment_s=1.7)
for number in range(4000):
    recording.write(number, time.monotonic())
    print(number, time.time(), flush=True)
    time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_sigkill_loses_at_most_a_second(seed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RECORD_UNTIL_KILLED, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()  # the imports take their time
        time.sleep(random.Random(seed).uniform(1.2, 4.5))
        killed_s = time.time()
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split("\n")
    written = [(int(line.split()[0]), float(line.split()[1])) for line in lines if line.count(" ") == 1]
    due = [number for number, time_s in written if time_s < killed_s - 1]
    paths = list_segments(tmp_path)
    stored = [number for path in paths for _, number in decode(path)]
    assert stored == list(range(len(stored)))
    assert stored[-1] >= due[-1]
    assert [number for path in paths for number in decode_with_opencv(path)] == stored


@pytest.mark.slow
def test_file_cut_at_any_byte_keeps_all_complete_fragments(tmp_path: Path) -> None:
    encoder, file = H264Encoder((120, 192)), FragmentedMp4(tmp_path / "a.mp4", (120, 192))
    for number in range(60):
        file.write(encoder.encode(make_image(number), 100 * number))
    file.close()
    data, boxes = file.path.read_bytes(), list_boxes(file.path.read_bytes())
    stops = np.cumsum([size for _, size in boxes])
    ends = stops[[kind == "mdat" for kind, _ in boxes]]
    headers = [(stop - size, stop) for stop, (kind, size) in zip(stops, boxes, strict=True) if kind != "mdat"]
    cut, rng = tmp_path / "cut.mp4", np.random.default_rng(0)
    for size in [*rng.integers(ends[0], len(data), 30).tolist(), *(ends[:5] + 1).tolist(), *(ends[:5] + 50).tolist()]:
        num_complete = 5 * int((ends <= size).sum())
        cut.write_bytes(data[:size])
        is_in_header = any(start < size < stop for start, stop in headers)  # some readers refuse it until repaired
        assert is_in_header or decode_with_opencv(cut)[:num_complete] == list(range(num_complete))
        num_removed = cut_incomplete_fragment(cut)
        assert num_removed == size - ends[ends <= size][-1]
        assert [number for _, number in decode(cut)] == list(range(num_complete))
    assert cut_incomplete_fragment(file.path) == 0


def test_start_repairs_what_a_killed_run_left(tmp_path: Path) -> None:
    whole, cut, empty, other = make_files(
        tmp_path,
        {
            "door/2026-01-01T00-00-00.000Z.mp4": 0,
            "door/2026-01-01T00-10-00.000Z.mp4": 0,
            "door/.2026-01-01T00-20-00.000Z.mp4": 0,
            "door/.mine.mp4": 0,
        },
    )
    boxes = struct.pack(">I4s", 8, b"moof") + struct.pack(">I4s", 12, b"mdat") + bytes(4)
    whole.write_bytes(boxes)
    cut.write_bytes(boxes + boxes[:11])
    Recorder(RecordingConfig(tmp_path), {"door": True}, print).close()
    assert [path.read_bytes() for path in (whole, cut)] == [boxes, boxes]
    assert not empty.exists()
    assert other.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("mount requires root")
    yield path
    subprocess.run(["umount", path], check=True)


def make_noise(rng: np.random.Generator, number: int) -> NDArray[np.uint8]:
    image = rng.integers(0, 256, (120, 192, 3), dtype=np.uint8)
    image[: BLOCK_PX + 4] = make_image(number)[: BLOCK_PX + 4]
    return image


@pytest.mark.slow
def test_full_disk_is_reported_and_recording_continues(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hkd_deploy.demo.camera_recorder.RETRY_S", 0.0)
    recording = Recording(small_disk, min_free_bytes=500_000)
    (small_disk / "other").write_bytes(bytes(600_000))
    rng = np.random.default_rng(0)
    for number in range(300):
        if number == 200:
            assert recording.recorder._queue is not None
            wait_until(recording.recorder._queue.empty)
            (small_disk / "other").unlink()
        recording.recorder.write(make_noise(rng, number), number / 10, False)
        if number == 290:  # full again; the report comes once per outage
            wait_until(recording.recorder._queue.empty)
    recording.recorder.close()
    assert len(recording.reports) >= 2
    assert recording.reports[0].endswith("No space left on device. Recording pauses until the disk accepts data.")
    assert recording.reports[1].endswith(": recording continues.")
    parts = [[number for _, number in decode(path)] for path in list_segments(small_disk)]
    assert len(parts) >= 2
    for part in parts:
        assert part == list(range(part[0], part[-1] + 1))
    assert parts[0][0] == 0
    assert 190 <= parts[1][0] <= 205
    assert recording.recorder.num_frames == sum(len(part) for part in parts)
    assert recording.recorder.num_frames + recording.recorder.num_dropped == 300


def test_write_error_in_a_fragment_leaves_a_complete_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, file = H264Encoder((120, 192)), FragmentedMp4(tmp_path / "a.mp4", (120, 192))
    write, num_calls = os.write, 0

    def write_half(descriptor: int, data: memoryview) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            return write(descriptor, data[: len(data) // 2])
        if num_calls > 4:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_half)
    with pytest.raises(OSError, match="No space"):
        for number in range(100):
            file.write(encoder.encode(make_image(number), 100 * number))
    data = (tmp_path / "a.mp4").read_bytes()
    assert sum(size for _, size in list_boxes(data)) == len(data) == file.num_bytes
    assert [number for _, number in decode(file.path)] == list(range(len(decode(file.path))))


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.slow
def test_slow_disk_never_delays_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fdatasync", lambda _: time.sleep(0.5))
    recording = Recording(tmp_path, is_live=True)
    slowest_s, start_s = 0.0, time.monotonic()
    for number in range(400):
        image = make_image(number)
        before_s = time.perf_counter()
        recording.recorder.write(image, start_s + number / 20, False)
        slowest_s = max(slowest_s, time.perf_counter() - before_s)
    assert slowest_s < 0.1
    assert recording.recorder.num_dropped > 200
    before_s = time.monotonic()
    recording.recorder.close()
    assert time.monotonic() - before_s < 1.5


def make_result(image: NDArray[np.uint8], box: list[float], time_s: float, privacy: str | None) -> FrameResult:
    found = Detections(np.array([box], np.float32), np.array([0.9], np.float32))
    times = StageTimes(1, 1, 1)
    return FrameResult("door 1", 0, image, found, found, 0.3, time_s, None, times, privacy=privacy)  # type: ignore[arg-type]


@pytest.mark.parametrize("privacy", ["fill", "pixelate", "blur", None])
def test_people_are_hidden_in_the_file(privacy: str | None, tmp_path: Path) -> None:
    stripes = np.full((128, 256, 3), 60, np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 220
    reports: list[str] = []
    recorder = Recorder(RecordingConfig(tmp_path), {"door 1": False}, lambda text, *_, **__: reports.append(text))
    for number in range(20):
        recorder.write(make_result(stripes, [64, 16, 128, 112], number / 10, privacy))
    recorder.close()
    (path,) = list_segments(tmp_path)
    assert path.parent.name == "door_1"
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    inside = [float(image[24:104, 72:120].std(axis=1).mean()) for image in images]
    outside = [float(image[24:104, 160:240].std(axis=1).mean()) for image in images]
    assert len(images) == 20
    assert min(outside) > 50
    if privacy is None:
        assert min(inside) > 50
    else:
        assert max(inside) < 0.35 * min(outside)


def make_files(directory: Path, sizes: dict[str, int]) -> list[Path]:
    paths = []
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        paths.append(path)
    return paths


def test_retention_deletes_the_oldest_recordings_only(tmp_path: Path) -> None:
    old, middle, new, active = make_files(
        tmp_path,
        {
            "b/2026-01-01T00-00-00.000Z.mp4": 400,
            "a/2026-01-02T00-00-00.000Z.mp4": 300,
            "b/2026-01-03T00-00-00.000Z_2.mp4": 200,
            "a/2026-01-01T00-00-00.500Z.mp4": 100,
        },
    )
    others = make_files(tmp_path, {"a/holiday.mp4": 5000, "a/2026-01-01T00-00-00.000Z.txt": 5000, "x.mp4": 5000})
    assert delete_old_segments(tmp_path, None, None) == []
    assert delete_old_segments(tmp_path, None, 1000, [active]) == []
    assert delete_old_segments(tmp_path, None, 599, [active, None]) == [old, middle]
    os.utime(new, (0, time.time() - 3601))
    os.utime(active, (0, time.time() - 9999))
    assert delete_old_segments(tmp_path, 3700, None, [active]) == []
    assert delete_old_segments(tmp_path, 3600, None, [active]) == [new]
    assert active.exists()
    assert all(path.exists() for path in others)


def test_recorder_keeps_the_size_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = RecordingConfig(tmp_path, segment_s=1, max_bytes=300_000)
    recorder = Recorder(config, {"door 1": False}, print)
    for number in range(120):
        recorder.write(make_result(make_noise(rng, number), [0, 0, 9, 9], number / 10, None))
    recorder.recorders["door 1"].close()
    wait_until(lambda: sum(path.stat().st_size for path in list_segments(tmp_path)) <= 300_000)
    recorder.close()
    newest = list_segments(tmp_path)[-1]
    assert decode(newest)[-1][1] == 119


def test_recorder_records_a_camera_that_a_reload_adds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    recorder = Recorder(RecordingConfig(tmp_path), {"door_1": False}, print)
    for number in range(20):
        recorder.write(make_result(make_noise(rng, number), [0, 0, 9, 9], number / 10, None))
    recorder.close()
    (path,) = list_segments(tmp_path)
    assert path.parent.name == "door_1_2" and len(decode(path)) == 20  # another directory than that of door_1


def test_file_names_are_utc_and_different(tmp_path: Path) -> None:
    first = make_segment_path(tmp_path, 1_796_040_000.25)
    assert first.name == "2026-11-30T12-00-00.250Z.mp4"
    first.touch()
    assert make_segment_path(tmp_path, 1_796_040_000.25).name == "2026-11-30T12-00-00.250Z_2.mp4"


@pytest.mark.skipif(os.name != "posix", reason="directories of Linux")
def test_directory_that_cannot_be_written_is_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/proc/recordings")):
        with pytest.raises(UsageError, match="Choose another directory"):
            Recorder(RecordingConfig(path), {"door": True}, print)
