"""HLS cameras: segments of video files, listed in a playlist that grows.

A frame exists for a viewer only when its segment is complete. The playlist is requested often around the time at which
the next segment is due. So the time at which a segment appears is known, and with it the age of its frames: the end of
the fastest segment was captured when it appeared, or at the time that the playlist states (EXT-X-PROGRAM-DATE-TIME).
Frames are returned at their intervals, not all at once. Of several new segments the newest is used.
"""

import http.client
import io
import queue
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from statistics import median
from threading import Event, Thread
from typing import Any
from urllib.parse import urljoin

from hkd_deploy.streams.decoding import (
    Hwaccel,
    convert_to_rgb,
    describe_unsupported,
    import_av,
    open_container,
    read_decoder,
)
from hkd_deploy.streams.live import CameraFrame, ReconnectPolicy
from hkd_deploy.streams.mjpeg import send_request
from hkd_deploy.streams.network import StreamClock, estimate_interval_s
from hkd_deploy.streams.sources import sanitize_fps
from hkd_det.errors import UnavailableError

PLAYLIST_TYPES = ("application/vnd.apple.mpegurl", "application/x-mpegurl", "audio/mpegurl", "audio/x-mpegurl")
MAX_PLAYLIST_BYTES = 1 << 20
MAX_SEGMENT_BYTES = 1 << 28
MIN_POLL_S, MAX_POLL_S = 0.05, 0.25
POLLS_PER_SEGMENT = 20
EARLY_S = 0.3  # requests of the playlist begin this long before the next segment is due
DELAY_GAIN = 0.3  # part of an unneeded delay that is removed with each segment
ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^,]*)')


@dataclass(frozen=True)
class Segment:
    """One entry of a playlist.

    Attributes:
        sequence: Number in the stream.
        url: Address of the file.
        duration_s: Stated duration, seconds.
        header_url: Address of the header of fragmented MP4. Empty for other formats.
        captured_s: Wall-clock time of the first frame that the sender states. None if it does not.
    """

    sequence: int
    url: str
    duration_s: float
    header_url: str
    captured_s: float | None


@dataclass(frozen=True)
class LoadedSegment:
    """A segment with its content.

    Attributes:
        segment: Its entry in the playlist.
        data: The file, after its header.
        requested_s: Time of the last request of a playlist without it, by the monotonic clock.
        appeared_s: Estimated time at which it appeared.
        listed_s: Time at which a playlist with it was there.
        loaded_s: Time at which its content was there.
    """

    segment: Segment
    data: bytes
    requested_s: float
    appeared_s: float
    listed_s: float
    loaded_s: float


@dataclass(frozen=True)
class Playlist:
    """A playlist.

    Attributes:
        segments: The segments, the oldest first.
        variants: Bit rate and address of other playlists of the same camera.
        is_supported: False if segments are encrypted or parts of a file.
        is_ended: True if no segments follow.
    """

    segments: tuple[Segment, ...]
    variants: tuple[tuple[int, str], ...]
    is_supported: bool
    is_ended: bool


def parse_playlist(text: str, url: str) -> Playlist:
    """Read a playlist.

    Args:
        text: Content.
        url: Its address, to which others are relative.

    Raises:
        ValueError: It is not a playlist.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != "#EXTM3U":
        raise ValueError
    segments: list[Segment] = []
    variants: list[tuple[int, str]] = []
    sequence, duration_s, header_url, captured_s, bit_rate = 0, 0.0, "", None, None
    for line in lines:
        tag, _, value = line.partition(":")
        attributes = {key: word.strip('"') for key, word in ATTRIBUTE.findall(value)}
        if tag == "#EXT-X-MEDIA-SEQUENCE":
            sequence = int(value)
        elif tag == "#EXTINF":
            duration_s = float(value.split(",")[0])
        elif tag == "#EXT-X-MAP":
            header_url = urljoin(url, attributes["URI"])
        elif tag == "#EXT-X-PROGRAM-DATE-TIME":
            captured_s = datetime.fromisoformat(value).timestamp()
        elif tag == "#EXT-X-STREAM-INF":
            bit_rate = int(attributes.get("BANDWIDTH", 0))
        elif not line.startswith("#") and bit_rate is not None:
            variants.append((bit_rate, urljoin(url, line)))
            bit_rate = None
        elif not line.startswith("#"):
            segments.append(Segment(sequence, urljoin(url, line), duration_s, header_url, captured_s))
            sequence, captured_s = sequence + 1, captured_s + duration_s if captured_s is not None else None
    is_encrypted = any(line.startswith("#EXT-X-KEY") and "METHOD=NONE" not in line for line in lines)
    has_parts = any("BYTERANGE" in line for line in lines if line.startswith(("#EXT-X-BYTERANGE", "#EXT-X-MAP")))
    is_ended = "#EXT-X-ENDLIST" in lines
    return Playlist(tuple(segments), tuple(variants), not (is_encrypted or has_parts), is_ended)


def open_hls(
    response: http.client.HTTPResponse,
    address: str,
    name: str,
    policy: ReconnectPolicy,
    clock: StreamClock,
    hwaccel: Hwaccel | None = None,
) -> "HlsReader | None":
    """Open an HLS camera.

    Args:
        response: Response of the camera to the request of `address`.
        address: URL of a playlist.
        name: The URL without credentials.
        policy: Timeouts.
        clock: Clock of the camera, which earlier connections used.
        hwaccel: Hardware decoder. None for the CPU.

    Returns:
        The reader. None if the response is no playlist, or one that FFmpeg has to read: encrypted segments, parts of
        files, or a recording.
    """
    if response.headers.get_content_type() not in PLAYLIST_TYPES:
        return None
    try:
        playlist = parse_playlist(response.read(MAX_PLAYLIST_BYTES).decode(errors="replace"), address)
        if playlist.variants:
            address = max(playlist.variants)[1]
            with send_request(address, name, policy.open_timeout_s) as variant:
                playlist = parse_playlist(variant.read(MAX_PLAYLIST_BYTES).decode(errors="replace"), address)
    except (OSError, ValueError, KeyError):
        return None
    if playlist.is_ended or not playlist.is_supported:
        return None
    return HlsReader(address, name, policy, clock, hwaccel)


class HlsReader:
    """One HLS camera.

    Args:
        address: URL of a playlist of segments.
        name: The URL without credentials.
        policy: Timeouts.
        clock: Clock of the camera, which earlier connections used.
        hwaccel: Hardware decoder. None for the CPU.

    Attributes:
        decoder: Device that decodes; see `read_decoder`.

    Raises:
        UnavailableError: PyAV is not installed.
    """

    def __init__(
        self, address: str, name: str, policy: ReconnectPolicy, clock: StreamClock, hwaccel: Hwaccel | None = None
    ) -> None:
        self._av = import_av()
        self._address, self._name, self._policy, self._hwaccel = address, name, policy, hwaccel
        self.decoder = ""
        self.fps: float | None = None
        self._opened_s = time.monotonic()
        self._clock = clock
        clock.begin_connection(keeps_timestamps=True)  # the segments go on while the line is interrupted
        self._delay_s, self._sequence = 0.0, -1
        self._header = ("", b"")
        self._stop = Event()
        self._segments: queue.Queue[LoadedSegment | UnavailableError] = queue.Queue(maxsize=2)
        self._frames = self._iterate_frames()
        self._thread = Thread(target=self._watch, name=f"playlist {name}", daemon=True)
        self._thread.start()

    def read(self) -> CameraFrame:
        """Wait for the next frame; see `CameraReader.read`."""
        return next(self._frames)

    def close(self) -> None:
        """Stop the thread that requests the playlist, without waiting for a request."""
        self._stop.set()

    def _iterate_frames(self) -> Iterator[CameraFrame]:
        limit_s = self._policy.key_frame_timeout_s
        while True:
            try:
                item = self._segments.get(timeout=limit_s)
            except queue.Empty:
                raise UnavailableError(
                    f"{self._name}: no new segment for {limit_s:g} s. Check that the camera is on and the network is "
                    "fast enough."
                ) from None
            if isinstance(item, UnavailableError):
                raise item
            limit_s = self._policy.read_timeout_s
            yield from self._pace_frames(item)

    def _pace_frames(self, loaded: LoadedSegment) -> Iterator[CameraFrame]:
        """Yield the frames of a segment at their intervals, without those from before the camera was opened."""
        is_next, is_first = loaded.segment.sequence == self._sequence + 1, True
        self._sequence = loaded.segment.sequence
        for frame in self._decode(loaded):
            if frame.captured_s < self._opened_s:
                continue
            if is_first:
                needed_s = loaded.loaded_s - frame.captured_s
                kept_s = needed_s + (1 - DELAY_GAIN) * (self._delay_s - needed_s)
                self._delay_s = max(needed_s, kept_s) if is_next else needed_s
                is_first = False
            self._stop.wait(max(0.0, frame.captured_s + self._delay_s - time.monotonic()))
            yield frame

    def _decode(self, loaded: LoadedSegment) -> Iterator[CameraFrame]:
        """Yield the frames of a segment."""
        try:
            with open_container(self._av, io.BytesIO(loaded.data), self._name, self._hwaccel) as container:
                if not container.streams.video:
                    raise UnavailableError(f"{self._name}: not a video: the stream has no images. Check the URL.")
                stream: Any = container.streams.video[0]
                stream.codec_context.thread_count = 1
                packets = list(container.demux(stream))
                times_s = [float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None]
                if not times_s:
                    return
                interval_s = estimate_interval_s(times_s)
                self.fps = sanitize_fps(round(1 / interval_s, 2)) if interval_s else None
                end_s = max(times_s) + interval_s
                end_captured_s = self._estimate_end(loaded, end_s)
                for frame in (frame for packet in packets for frame in packet.decode()):
                    self.decoder = read_decoder(stream.codec_context, self._hwaccel)
                    ratio = float(stream.codec_context.sample_aspect_ratio or 1)
                    yield CameraFrame(partial(convert_to_rgb, frame, ratio), end_captured_s - (end_s - frame.time))
        except self._av.FFmpegError:  # a damaged segment; without others, the camera is lost
            if self._hwaccel and self._hwaccel.is_required and not self.decoder:
                raise UnavailableError(f"{self._name}: {describe_unsupported(self._hwaccel)}") from None

    def _estimate_end(self, loaded: LoadedSegment, end_s: float) -> float:
        """Return the capture time of the end of a segment, whose timestamp is `end_s`."""
        segment, appeared_s, sender_age_s = loaded.segment, loaded.appeared_s, None
        expected_s = self._clock.expect_arrival_s(end_s)
        if expected_s is not None:  # if it can have appeared as fast as the fastest segment, it did
            appeared_s = min(max(expected_s, loaded.requested_s), loaded.listed_s)
        if segment.captured_s is not None:
            appeared_wall_s = time.time() - time.monotonic() + appeared_s
            sender_age_s = appeared_wall_s - (segment.captured_s + segment.duration_s)
        return appeared_s - self._clock.estimate_age_s(end_s, appeared_s, sender_age_s)

    def _watch(self) -> None:
        """Body of the thread: request the playlist, load each segment that appears."""
        poll_s, requested_s = MIN_POLL_S, time.monotonic()
        try:
            last = max((segment.sequence for segment in self._load_playlist().segments), default=-1)
            while not self._stop.wait(poll_s):
                previous_s, requested_s = requested_s, time.monotonic()
                segments = self._load_playlist().segments
                if not segments or segments[-1].sequence == last:
                    poll_s = _limit_poll(segments[-1].duration_s if segments else 0.0)
                    continue
                newest, listed_s = segments[-1], time.monotonic()
                last = newest.sequence
                # The median, because the duration of a segment includes a pause of the camera.
                duration_s, gap_s = median(segment.duration_s for segment in segments), listed_s - previous_s
                # It appeared between two requests. If these are far apart, an early time would pass for a fast segment.
                appeared_s = listed_s - (gap_s / 2 if gap_s < 3 * _limit_poll(duration_s) else 0.0)
                data = self._load_segment(newest)
                self._put(LoadedSegment(newest, data, previous_s, appeared_s, listed_s, time.monotonic()))
                poll_s = max(listed_s + duration_s - EARLY_S - time.monotonic(), _limit_poll(duration_s))
        except UnavailableError as error:
            self._put(error)

    def _put(self, item: LoadedSegment | UnavailableError) -> None:
        """Pass an item to the reader. A full queue loses its oldest item."""
        while True:
            try:
                return self._segments.put_nowait(item)
            except queue.Full:
                self._segments.get_nowait()

    def _load_playlist(self) -> Playlist:
        text = self._load(self._address, MAX_PLAYLIST_BYTES).decode(errors="replace")
        try:
            playlist = parse_playlist(text, self._address)
        except (ValueError, KeyError):
            raise UnavailableError(f"{self._name}: not a valid playlist. Check the path of the URL.") from None
        if playlist.is_ended:
            raise UnavailableError(f"{self._name}: the camera ended the stream. Check that it is on.")
        return playlist

    def _load_segment(self, segment: Segment) -> bytes:
        if segment.header_url and segment.header_url != self._header[0]:
            self._header = (segment.header_url, self._load(segment.header_url, MAX_SEGMENT_BYTES))
        header = self._header[1] if segment.header_url else b""
        return header + self._load(segment.url, MAX_SEGMENT_BYTES)

    def _load(self, url: str, max_bytes: int) -> bytes:
        limit_s = self._policy.read_timeout_s
        try:
            with send_request(url, self._name, limit_s) as response:
                return response.read(max_bytes)
        except TimeoutError:
            raise UnavailableError(
                f"{self._name}: no data for {limit_s:g} s. Check that the camera is on and reachable."
            ) from None
        except (OSError, ValueError):
            raise UnavailableError(
                f"{self._name}: the connection was closed. Check the camera and the network."
            ) from None


def _limit_poll(duration_s: float) -> float:
    return min(MAX_POLL_S, max(MIN_POLL_S, duration_s / POLLS_PER_SEGMENT))
