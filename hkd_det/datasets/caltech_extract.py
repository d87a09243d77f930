"""Extract the images of Caltech Pedestrian from its videos.

ROOT/videos/set06/V000.seq or ROOT/set06/V000.seq becomes ROOT/images/set06/V000/I00029.jpg and so on. Existing
images are kept.
"""

import argparse
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range
from hkd_det.console import iterate_with_progress, log_stage
from hkd_det.datasets.caltech import SETS, parse_sets
from hkd_det.errors import DataError, run_command
from hkd_det.files import atomic_write
from hkd_det.image_header import JPEG_EOI, JPEG_SOI, is_truncated_png, parse_image_header

HEADER_BYTES, TIME_BYTES = 1024, 6
MAX_VERSION = 4  # later versions have another layout, which the toolbox does not support
MAX_PIXELS = 2**26
RAW, JPEG, PNG = "raw", "jpg", "png"
CODECS = {100: RAW, 200: RAW, 101: RAW, 102: JPEG, 201: JPEG, 103: JPEG, 1: PNG, 2: PNG}
BAYER_CODECS = (101, 103)  # one value per pixel: blue, green / green, red
MAGIC = {JPEG: JPEG_SOI, PNG: b"\x89P"}


@dataclass(frozen=True)
class SeqHeader:
    """Header of a `.seq` video.

    Attributes:
        size_hw: Frame height and width in pixels.
        channels: Values per pixel.
        codec: Codec number of the file, a key of `CODECS`.
        num_frames: Number of frames; 0 if the header does not contain it.
        frame_bytes: Bytes of an uncompressed frame.
        frame_stride_bytes: Distance of uncompressed frames in bytes.
    """

    size_hw: tuple[int, int]
    channels: int
    codec: int
    num_frames: int
    frame_bytes: int
    frame_stride_bytes: int

    @property
    def encoding(self) -> str:
        """RAW, JPEG or PNG."""
        return CODECS[self.codec]


class SeqVideo:
    """An open Norpix `.seq` video with random access to its `len(video)` frames.

    The format is read as by seqReaderPlugin.m of Piotr's toolbox. After a header of 1024 bytes the frames follow each
    other. Uncompressed frames have a constant stride. A compressed frame begins with its size and ends with its
    timestamp and 2 or 10 unused bytes. All numbers are little-endian.

    Attributes:
        path: Video file.
        header: Header of the file.
        size_hw: Frame height and width in pixels.

    Args:
        path: Video file, for error messages.
        file: The open file. The caller closes it.
        header: Header of the file.

    Raises:
        DataError: The file is truncated.
    """

    def __init__(self, path: Path, file: BinaryIO, header: SeqHeader) -> None:
        self.path, self.header, self._file = path, header, file
        self.size_hw = header.size_hw
        self._offsets, self._sizes = _index_frames(path, file, header)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def is_jpeg(self) -> bool:
        """Whether `read_raw` returns JPEG files that show the frames."""
        return self.header.encoding == JPEG and self.header.codec not in BAYER_CODECS

    def read_raw(self, index: int) -> bytes:
        """Read the stored bytes of a frame.

        Args:
            index: 0-based frame number.

        Returns:
            A JPEG or PNG file, or BGR pixels in row order.

        Raises:
            IndexError: There is no such frame.
            DataError: The frame is incomplete.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        raw = _read_at(self._file, self._offsets[index], self._sizes[index])
        if self.header.encoding == JPEG and not (raw.startswith(JPEG_SOI) and raw.endswith(JPEG_EOI)):
            raise DataError(f"{self.path}: frame {index} is not a complete JPEG. Download the video again.")
        return raw

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read and decode a frame.

        Args:
            index: 0-based frame number.

        Returns:
            array[H, W, 3]: RGB, uint8.

        Raises:
            IndexError: There is no such frame.
            DataError: The frame cannot be decoded.
        """
        raw, is_bayer = self.read_raw(index), self.header.codec in BAYER_CODECS
        if self.header.encoding == RAW:
            channels = () if self.header.channels == 1 else (self.header.channels,)
            image = np.frombuffer(raw, np.uint8).reshape(*self.size_hw, *channels)
        else:
            image = self._decode(raw, index, cv2.IMREAD_GRAYSCALE if is_bayer else cv2.IMREAD_COLOR)
        if is_bayer:
            return cv2.cvtColor(image, cv2.COLOR_BayerBGGR2RGB)
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)

    def _decode(self, raw: bytes, index: int, flag: int) -> NDArray[np.uint8]:
        """Decode to [H, W] or [H, W, 3] BGR. Check the size first: decoding a wrong one could allocate gigabytes."""
        header, image = parse_image_header(raw), None
        with suppress(cv2.error):
            if header and header.stored_hw == self.size_hw and not is_truncated_png(raw):
                image = cv2.imdecode(np.frombuffer(raw, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            height, width = self.size_hw
            raise DataError(f"{self.path}: frame {index} is not an image of {width} x {height}. Download it again.")
        return image


@contextmanager
def open_seq(path: Path) -> Iterator[SeqVideo]:
    """Open a `.seq` video. The file is closed at the end of the `with` block.

    Args:
        path: Video file.

    Yields:
        The open video.

    Raises:
        DataError: The file is missing, is not a `.seq` video, or is truncated. The message of a truncated
            file contains the number of complete frames.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such video. Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a .seq video, got a directory.") from None
    with file:
        yield SeqVideo(path, file, _parse_header(file.read(HEADER_BYTES), path))


def _parse_header(raw: bytes, path: Path) -> SeqHeader:
    if len(raw) < HEADER_BYTES or raw[:24] != b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le"):
        raise DataError(f"{path}: not a .seq video (no Norpix header). Download it again.")
    version, header_bytes = struct.unpack_from("<iI", raw, 28)
    width, height, depth, used_depth, frame_bytes, codec, num_frames, origin, stride = struct.unpack_from(
        "<9I", raw, 548
    )
    if version > MAX_VERSION or header_bytes != HEADER_BYTES or origin != 0:
        raise DataError(
            f"{path}: .seq version {version}, header of {header_bytes} bytes, origin {origin} are not "
            f"supported. Expected a version up to {MAX_VERSION}, a header of {HEADER_BYTES} bytes and origin 0."
        )
    if codec not in CODECS:
        raise DataError(f"{path}: .seq codec {codec} is not supported. Expected one of {', '.join(map(str, CODECS))}.")
    if not 0 < width * height <= MAX_PIXELS or used_depth != 8:
        raise DataError(
            f"{path}: expected 8 bits per pixel and at most {MAX_PIXELS:,} pixels, got {used_depth} bits and "
            f"{width} x {height} pixels."
        )
    header = SeqHeader((height, width), depth // 8, codec, num_frames, frame_bytes, stride)
    if header.encoding == RAW:
        _check_raw(header, path)
    return header


def _check_raw(header: SeqHeader, path: Path) -> None:
    height, width = header.size_hw
    valid_channels = (1,) if header.codec in BAYER_CODECS else (1, 3)
    if header.channels not in valid_channels or header.frame_bytes != height * width * header.channels:
        raise DataError(
            f"{path}: {width} x {height} pixels of {header.channels} bytes do not match frames of "
            f"{header.frame_bytes} bytes. Download the video again."
        )
    if header.frame_stride_bytes < header.frame_bytes + TIME_BYTES or header.num_frames == 0:
        raise DataError(
            f"{path}: invalid number or stride of frames: {header.num_frames} uncompressed frames of "
            f"{header.frame_stride_bytes} bytes with their timestamps. Download the video again."
        )


def _index_frames(path: Path, file: BinaryIO, header: SeqHeader) -> tuple[list[int], list[int]]:
    """Return offset and size of the bytes of each frame."""
    end = file.seek(0, 2)
    if header.encoding == RAW:
        stride = header.frame_stride_bytes
        num_complete = max(0, end - HEADER_BYTES - header.frame_bytes + stride) // stride
        if num_complete < header.num_frames:
            raise _make_truncated_error(path, num_complete, header.num_frames, end)
        offsets = [HEADER_BYTES + index * stride for index in range(header.num_frames)]
        return offsets, [header.frame_bytes] * header.num_frames
    offsets, sizes = [], []
    position, extra = HEADER_BYTES, TIME_BYTES + 2
    while len(offsets) < header.num_frames if header.num_frames else position < end:
        prefix = _read_at(file, position, 6) if position + 6 <= end else b""
        size = int.from_bytes(prefix[:4], "little")
        if prefix[4:] != MAGIC[header.encoding] or not 6 <= size <= end - position:
            raise _make_truncated_error(path, len(offsets), header.num_frames, position)
        offsets.append(position + 4)
        sizes.append(size - 4)
        position += size + extra
        # The toolbox detects 8 more unused bytes in the same way.
        if len(offsets) == 1 and position + 4 <= end and _read_at(file, position, 4) == bytes(4):
            extra, position = extra + 8, position + 8
    return offsets, sizes


def _make_truncated_error(path: Path, num_complete: int, num_frames: int, offset: int) -> DataError:
    of_total = f" of {num_frames}" if num_frames else ""
    return DataError(
        f"{path}: truncated or damaged at byte {offset}; {num_complete}{of_total} frames are complete. "
        "Download it again."
    )


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    raw = file.read(count)
    if len(raw) < count:
        raise DataError(f"{file.name}: ends at byte {offset + len(raw)}, before {offset + count}. Download it again.")
    return raw


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m hkd_det.datasets.caltech_extract`.

    Args:
        argv: Command-line arguments (default: `sys.argv[1:]`).

    Returns:
        The exit code.
    """
    return run_command("caltech_extract", _run, argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = _build_parser().parse_args(argv)
    check_range("--frame-step", arguments.frame_step, 1)
    sets, image_dir = parse_sets(arguments.sets), arguments.root / "images"
    videos = _list_videos(arguments.root, sets)
    counts = {name: [0, 0, 0] for name in sets}  # videos, written images, existing images
    log_stage(f"extract images of {len(videos)} videos")
    for path in iterate_with_progress(videos, len(videos), "extract images", "video"):
        extracted = extract_frames(path, image_dir / path.parent.name / path.stem, arguments.frame_step)
        counts[path.parent.name] = [a + b for a, b in zip(counts[path.parent.name], (1, *extracted), strict=True)]
    for name, (num_videos, num_written, num_existing) in counts.items():
        print(
            f"{name}: {num_videos} videos, {num_written} images written to {image_dir / name}, {num_existing} existed"
        )
    return 0


def extract_frames(path: Path, folder: Path, frame_step: int) -> tuple[int, int]:
    """Extract every n-th frame of a video.

    Args:
        path: `.seq` video. JPEG frames are copied byte by byte; others are written as PNG.
        folder: Target directory of `I00029.jpg` and so on.
        frame_step: Extract the frames with the indices frame_step - 1, 2 * frame_step - 1 and so on.

    Returns:
        Number of written and of existing images.

    Raises:
        DataError: The video is missing or invalid.
    """
    with open_seq(path) as video:
        indices = range(frame_step - 1, len(video), frame_step)
        suffix = ".jpg" if video.is_jpeg else ".png"
        missing = [(index, target) for index in indices if not (target := folder / f"I{index:05}{suffix}").exists()]
        for index, target in missing:
            encoded = _encode_frame(video, index)
            with atomic_write(target) as temp_path:
                temp_path.write_bytes(encoded)
    return len(missing), len(indices) - len(missing)


def _encode_frame(video: SeqVideo, index: int) -> bytes:
    if video.is_jpeg:
        return video.read_raw(index)
    return cv2.imencode(".png", cv2.cvtColor(video.read_frame(index), cv2.COLOR_RGB2BGR))[1].tobytes()


def _list_videos(root: Path, sets: Sequence[str]) -> list[Path]:
    for folder in (root / "videos", root):
        videos = [path for name in sets for path in sorted((folder / name).glob("V*.seq"))]
        if videos:
            return videos
    raise DataError(f"{root}: contains no videos. Expected videos/{sets[0]}/V*.seq or {sets[0]}/V*.seq.")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hkd_det.datasets.caltech_extract", description=__doc__)
    parser.add_argument("root", type=Path, help="directory that contains videos/set06/V000.seq or set06/V000.seq")
    parser.add_argument(
        "--frame-step",
        type=int,
        default=30,
        help="extract every n-th frame (default: %(default)s, the frames 29, 59, ... of the test protocol)",
    )
    parser.add_argument(
        "--sets", default=f"{SETS[0]}-{SETS[-1]}", help="a set or a range of sets (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
