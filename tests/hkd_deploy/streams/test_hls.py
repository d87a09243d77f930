"""HLS cameras: a server on this machine writes segments of 0.5 s with PyAV."""

import io
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from hkd_deploy.streams import open_source
from hkd_deploy.streams.hls import HlsReader, LoadedSegment, Segment, parse_playlist
from hkd_deploy.streams.live import ReconnectPolicy
from hkd_deploy.streams.network import StreamClock

av = pytest.importorskip("av")
FPS, NUM_FRAMES = 20, 10  # of a segment
POLICY = ReconnectPolicy(open_timeout_s=2, read_timeout_s=2, retry_s=0.05)


class HlsCamera:
    """Image n has gray level 20 + 4 (n % 50); `made_s` has the times. `hangs` delays all answers."""

    def __init__(self) -> None:
        self.hangs, self.is_off, self.states_time = False, False, False
        self.made_s: dict[int, float] = {}
        self.num_playlists = 0
        self._segments: dict[int, tuple[bytes, float]] = {}
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                while camera.hangs:
                    time.sleep(0.01)
                kind, body = camera.answer(self.path)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Discard the log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/live.m3u8"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=self._write_segments, daemon=True).start()

    def close(self) -> None:
        self.is_off = True
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[str, bytes]:
        if path.endswith(".ts"):
            return "video/mp2t", self._segments[int(path[1:-3])][0]
        self.num_playlists += 1
        newest = sorted(self._segments)[-4:]
        lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", f"#EXT-X-MEDIA-SEQUENCE:{newest[0] if newest else 0}"]
        for number in newest:
            if self.states_time:
                stated = datetime.fromtimestamp(self._segments[number][1], timezone.utc)
                lines.append(f"#EXT-X-PROGRAM-DATE-TIME:{stated.isoformat()}")
            lines += [f"#EXTINF:{NUM_FRAMES / FPS},", f"{number}.ts"]
        return "application/vnd.apple.mpegurl", "\n".join(lines).encode()

    def _write_segments(self) -> None:
        start_s, number = time.monotonic(), 0
        while not self.is_off:
            output, first_s = io.BytesIO(), time.time()
            with av.open(output, "w", format="mpegts") as container:
                stream = container.add_stream("libx264", FPS)
                stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
                stream.codec_context.options = {"tune": "zerolatency", "preset": "ultrafast"}
                for _ in range(NUM_FRAMES):
                    time.sleep(max(0.0, start_s + number / FPS - time.monotonic()))
                    self.made_s[number % 50] = time.monotonic()
                    image = np.full((64, 96, 3), 20 + 4 * (number % 50), np.uint8)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, FPS)
                    container.mux(stream.encode(frame))
                    number += 1
                time.sleep(max(0.0, start_s + number / FPS - time.monotonic()))  # ends with the next key frame
                container.mux(stream.encode())
            self._segments[number // NUM_FRAMES] = (output.getvalue(), first_s)


@pytest.fixture
def hls_camera() -> Iterator[HlsCamera]:
    camera = HlsCamera()
    time.sleep(1.2)  # the camera is on for longer than two segments
    yield camera
    camera.close()


def watch(camera: HlsCamera, seconds: float, hang_s: float = 0.0) -> np.ndarray:
    """Return time, number, reported age and true age of each frame."""
    rows, start_s = [], time.monotonic()
    with open_source(camera.address, POLICY) as source:
        for frame in source.iterate_frames(lambda: time.monotonic() < start_s + seconds):
            now_s = time.monotonic()
            number = round((int(frame.image_rgb[32, 48, 0]) - 20) / 4) % 50
            rows.append((now_s - start_s, number, now_s - frame.timestamp_s, now_s - camera.made_s[number]))
            if hang_s and not camera.hangs and len(rows) == 20:
                camera.hangs = True
                threading.Timer(hang_s, setattr, (camera, "hangs", False)).start()
            if now_s > start_s + seconds:
                break
        assert source.fps == pytest.approx(FPS, rel=0.01)
    return np.array(rows)


@pytest.mark.slow
def test_hls_returns_each_frame_at_its_interval(hls_camera: HlsCamera) -> None:
    rows = watch(hls_camera, 4)
    assert rows[0, 0] < 1.5  # a segment, and its transfer
    assert (np.diff(rows[:, 1]) % 50 == 1).mean() > 0.95
    assert np.percentile(np.diff(rows[:, 0]), 90) < 2.5 / FPS
    assert len(rows) > 2 * FPS


@pytest.mark.slow
@pytest.mark.parametrize("states_time", [False, True])
def test_hls_age_includes_the_segment(hls_camera: HlsCamera, states_time: bool) -> None:
    hls_camera.states_time = states_time
    *_, reported_s, true_s = watch(hls_camera, 4).T
    assert np.median(true_s) > NUM_FRAMES / FPS
    assert np.median(np.abs(reported_s - true_s)) < 0.05


@pytest.mark.slow
def test_hls_skips_what_a_hang_held_back(hls_camera: HlsCamera) -> None:
    times_s, _, reported_s, true_s = watch(hls_camera, 6, hang_s=1.5).T
    assert np.diff(times_s).max() > 0.8  # the hang
    assert np.median(true_s[-20:]) < np.median(true_s[5:20]) + 0.2
    assert np.percentile(np.abs(reported_s - true_s), 90) < 0.1


@pytest.mark.slow
def test_playlist_is_requested_a_few_times_per_segment(hls_camera: HlsCamera) -> None:
    hls_camera.num_playlists = 0
    watch(hls_camera, 4)
    assert hls_camera.num_playlists < 8 * 4 * FPS / NUM_FRAMES


@pytest.mark.parametrize(
    ("requested_s", "listed_s", "expected_s"),
    [
        (9.9, 10.4, 10.0),  # a request that took long: it can have appeared at its time, so it did
        (10.2, 10.3, 10.0),  # it appeared after 10.2 s, late by 0.2 s; its end was captured at its time
        (9.7, 9.8, 9.8),  # earlier than the fastest segment before
    ],
)
def test_end_of_a_segment_is_that_of_the_fastest(requested_s: float, listed_s: float, expected_s: float) -> None:
    reader, clock = HlsReader.__new__(HlsReader), StreamClock()
    reader._clock = clock
    for end_s in range(5, 10):
        clock.estimate_age_s(float(end_s), float(end_s))
    middle_s = (requested_s + listed_s) / 2
    loaded = LoadedSegment(Segment(1, "", 1.0, "", None), b"", requested_s, middle_s, listed_s, listed_s)
    assert reader._estimate_end(loaded, 10.0) == pytest.approx(expected_s, abs=0.01)


def test_playlist_of_variants_headers_and_times() -> None:
    variants = parse_playlist(
        '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=800,CODECS="avc1.4d,mp4a"\nlow.m3u8\n#EXT-X-STREAM-INF:BANDWIDTH=900\nhigh',
        "http://a:b@host/x/live.m3u8?k=1",
    )
    assert variants.variants == ((800, "http://a:b@host/x/low.m3u8"), (900, "http://a:b@host/x/high"))
    text = "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:7\n{}#EXTINF:2.5,title\n0.m4s\n#EXTINF:2,\nhttp://other/1.m4s\n"
    times = '#EXT-X-MAP:URI="init.mp4"\n#EXT-X-PROGRAM-DATE-TIME:1970-01-01T00:01:00.500Z\n'
    playlist = parse_playlist(text.format(times), "http://host/x/live.m3u8")
    assert [segment.sequence for segment in playlist.segments] == [7, 8]
    assert [segment.captured_s for segment in playlist.segments] == [60.5, 63.0]
    assert [segment.url for segment in playlist.segments] == ["http://host/x/0.m4s", "http://other/1.m4s"]
    assert playlist.segments[0].header_url == "http://host/x/init.mp4"
    assert playlist.is_supported and not playlist.is_ended
    assert parse_playlist(text.format("#EXT-X-ENDLIST\n"), "").is_ended
    assert not parse_playlist(text.format('#EXT-X-KEY:METHOD=AES-128,URI="k"\n'), "").is_supported
    assert not parse_playlist(text.format("#EXT-X-BYTERANGE:10@0\n"), "").is_supported
    with pytest.raises(ValueError):
        parse_playlist("<html>", "")
