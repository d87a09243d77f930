"""Decoding with PyAV (FFmpeg), on the CPU or on a hardware decoder: `hkd-demo --hwaccel`.

The name and the values are those of FFmpeg's option -hwaccel: `none`, `auto`, or a device type such as `cuda` (NVDEC).
A device that is requested by name is used or reported as an error. With `auto`, FFmpeg decodes on the CPU what the
device cannot decode. The device that decodes is read back from the decoder.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UnavailableError, UsageError, import_package

INSTALL_HINT = "Network cameras require it. Run pip install 'hkd-det[live]'."
NONE, AUTO, CPU = "none", "auto", "cpu"
PROBED_CODEC = "h264"  # what network cameras send; devices that decode it decode H.265 as well
DEVICE_HINTS = {
    "cuda": "Install the NVIDIA driver (nvidia-smi shows the GPU). A container needs --gpus all and "
    "NVIDIA_DRIVER_CAPABILITIES=compute,video,utility.",
    "vaapi": "Install the VA-API driver (vainfo shows its profiles), and add the user to the group render.",
}
DEFAULT_DEVICE_HINT = "Install the driver of the device, and check its permissions."


@dataclass(frozen=True)
class Hwaccel:
    """A hardware decoder.

    Attributes:
        kind: Device type of FFmpeg, such as `cuda`, or `cpu` if `auto` found none.
        device: Index or path of the device. None for the first one.
        is_required: Whether it is an error if the device cannot decode a stream. Otherwise the CPU decodes it.
    """

    kind: str
    device: str | None = None
    is_required: bool = True


def resolve_hwaccel(text: str) -> Hwaccel | None:
    """Find the hardware decoder of `--hwaccel` and open it once, so that a missing one is an error at the start.

    Args:
        text: `none`, `auto`, a device type (`cuda`), or a device type and a device (`cuda:1`,
            `vaapi:/dev/dri/renderD129`).

    Returns:
        The decoder. Its kind is `cpu` if `auto` finds no device. None for `none`.

    Raises:
        UsageError: FFmpeg knows no such device type.
        UnavailableError: PyAV is not installed or was built without the device, or the device cannot be opened.
    """
    if text == NONE:
        return None
    av = import_av()
    if text == AUTO:
        for kind in _list_built_kinds(av):
            with suppress(UnavailableError):
                _open_device(av, Hwaccel(kind), text)
                return Hwaccel(kind, is_required=False)
        return Hwaccel(CPU, is_required=False)
    kind, _, device = text.partition(":")
    known = [kind.name for kind in av.codec.hwaccel.HWDeviceType if kind.name != NONE]
    if kind not in known:
        raise UsageError(f"--hwaccel {text}: expected {NONE}, {AUTO} or a device type of FFmpeg ({', '.join(known)}).")
    built = list(_list_built_kinds(av))
    if kind not in built:
        raise UnavailableError(
            f"--hwaccel {text}: FFmpeg in PyAV {av.__version__} was built without it; it has "
            f"{', '.join(built) or 'no hardware decoder'}. Build PyAV for an FFmpeg with {kind} (pip install "
            f"--no-binary av av), or use --hwaccel {AUTO}."
        )
    hwaccel = Hwaccel(kind, device or None)
    _open_device(av, hwaccel, text)
    return hwaccel


def open_container(av: ModuleType, file: Any, name: str, hwaccel: Hwaccel | None, **options: Any) -> Any:
    """Open a stream for decoding.

    Args:
        av: The module `av`.
        file: URL or file object.
        name: Display name, without credentials.
        hwaccel: Hardware decoder. None for the CPU.
        options: Further arguments of `av.open`.

    Returns:
        av.container.InputContainer.

    Raises:
        UnavailableError: The device is required and does not decode the codec.
    """
    try:
        accelerator = _make_accelerator(av, hwaccel) if hwaccel and hwaccel.kind != CPU else None
        return av.open(file, hwaccel=accelerator, **options)
    except RuntimeError as error:
        if hwaccel is None or isinstance(error, av.FFmpegError):
            raise
        raise UnavailableError(f"{name}: {describe_unsupported(hwaccel)}") from None


def describe_unsupported(hwaccel: Hwaccel) -> str:
    """Return the problem and the remedy for a stream that a required device does not decode.

    Args:
        hwaccel: The device.
    """
    return (
        f"{hwaccel.kind} does not decode this codec or profile. Set the camera to H.264 or H.265 with 8 bits, or use "
        f"--hwaccel {AUTO}."
    )


def read_decoder(context: Any, hwaccel: Hwaccel | None) -> str:
    """Read back which device decodes a stream.

    Args:
        context: av.VideoCodecContext that decoded an image.
        hwaccel: Requested hardware decoder. None for the CPU.

    Returns:
        Device type, such as `cuda`, or `cpu`. Empty if no hardware decoder was requested.
    """
    if hwaccel is None:
        return ""
    # FFmpeg sets the pixel format of the decoder to that of the device, or to that of the stream after a fallback.
    formats = [
        config.format.name for config in context.codec.hardware_configs or () if config.device_type.name == hwaccel.kind
    ]
    return hwaccel.kind if context.is_hwaccel and context.pix_fmt in formats else CPU


def _list_built_kinds(av: ModuleType) -> Iterator[str]:
    """Yield the device types with which PyAV can decode H.264."""
    for config in av.Codec(PROBED_CODEC, "r").hardware_configs or ():
        if config.is_supported:
            yield config.device_type.name


def _make_accelerator(av: ModuleType, hwaccel: Hwaccel) -> Any:
    # By number, because PyAV takes an unknown name for any device.
    kind = av.codec.hwaccel.HWDeviceType[hwaccel.kind]
    return av.codec.hwaccel.HWAccel(kind, hwaccel.device, allow_software_fallback=not hwaccel.is_required)


def _open_device(av: ModuleType, hwaccel: Hwaccel, text: str) -> None:
    try:
        _make_accelerator(av, hwaccel).create(av.Codec(PROBED_CODEC, "r"))
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = DEVICE_HINTS.get(hwaccel.kind, DEFAULT_DEVICE_HINT)
        raise UnavailableError(
            f"--hwaccel {text}: the device cannot be opened ({reason}). {hint} Or use --hwaccel {AUTO}."
        ) from None


def import_av() -> ModuleType:
    """Return the module `av` with its log turned off, which would contain URLs.

    Raises:
        UnavailableError: PyAV is not installed.
    """
    av = import_package("av", "PyAV (av)", INSTALL_HINT)
    av.logging.set_level(None)
    return av


def convert_to_rgb(frame: Any, pixel_ratio: float) -> NDArray[np.uint8]:
    """Convert a decoded frame to RGB with square pixels.

    Args:
        frame: av.VideoFrame.
        pixel_ratio: Width of a stored pixel divided by its height.

    Returns:
        uint8[H, W, 3].
    """
    if pixel_ratio != 1:
        frame = frame.reformat(width=max(1, round(frame.width * pixel_ratio)), height=frame.height)
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return image
