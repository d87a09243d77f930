"""Hardware decoders: the real errors of this machine, and a device that a fake of PyAV decodes with."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hkd_deploy.demo.cli import main
from hkd_deploy.streams import decoding, open_source
from hkd_deploy.streams.decoding import Hwaccel, open_container, read_decoder, resolve_hwaccel
from hkd_deploy.streams.live import CameraFrame, LiveSource, ReconnectPolicy
from hkd_det.errors import UnavailableError, UsageError

av = pytest.importorskip("av")
HAS_CUDA = "cuda" in list(decoding._list_built_kinds(av))
GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl")


@dataclass
class FakeAccelerator:
    """Replacement of av.codec.hwaccel.HWAccel. `working` has the device types that can be opened."""

    working: set[str] = field(default_factory=set)

    def __call__(self, kind: Any, device: str | None, allow_software_fallback: bool) -> "FakeAccelerator":
        self.kind, self.device, self.allow_software_fallback = kind, device, allow_software_fallback
        return self

    def create(self, codec: Any) -> None:
        assert codec.name == "h264"
        if self.kind.name not in self.working:
            raise av.error.PermissionError(1, "Operation not permitted")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """A PyAV that was built with CUDA and VA-API, in this order."""
    fake = FakeAccelerator()
    monkeypatch.setattr(av.codec.hwaccel, "HWAccel", fake)
    monkeypatch.setattr(decoding, "_list_built_kinds", lambda _av: iter(["cuda", "vaapi"]))
    return fake


def has_gpu() -> bool:
    try:
        resolve_hwaccel("cuda")
    except UnavailableError:
        return False
    return True


def test_none_needs_no_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "import_av", lambda: pytest.fail("PyAV is imported"))
    assert resolve_hwaccel("none") is None


def test_unknown_device_type_is_a_usage_error() -> None:
    """PyAV itself takes an unknown name for any device."""
    with pytest.raises(UsageError, match=r"--hwaccel gpu: expected none, auto or a device type of FFmpeg \(.*cuda.*\)"):
        resolve_hwaccel("gpu")


@pytest.mark.skipif("vaapi" in list(decoding._list_built_kinds(av)), reason="PyAV has VA-API")
def test_device_that_pyav_was_built_without() -> None:
    with pytest.raises(UnavailableError, match=r"--hwaccel vaapi: .* built without it; it has .* --hwaccel auto\.$"):
        resolve_hwaccel("vaapi")


@pytest.mark.skipif(not HAS_CUDA, reason="PyAV was built without CUDA")
def test_absent_gpu_is_an_error_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    assert main(["--source", "rtsp://127.0.0.1:9/x", "--no-show", "--hwaccel", "cuda"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hkd-demo: --hwaccel cuda: the device cannot be opened (")
    assert "nvidia-smi" in line and line.endswith("Or use --hwaccel auto.")


def test_auto_takes_the_first_device_that_opens(accelerator: FakeAccelerator) -> None:
    accelerator.working = {"vaapi"}
    assert resolve_hwaccel("auto") == Hwaccel("vaapi", is_required=False)
    assert accelerator.allow_software_fallback is False  # the probe
    accelerator.working = set()
    assert resolve_hwaccel("auto") == Hwaccel("cpu", is_required=False)


def test_device_of_a_type(accelerator: FakeAccelerator) -> None:
    accelerator.working = {"vaapi"}
    assert resolve_hwaccel("vaapi:/dev/dri/renderD129") == Hwaccel("vaapi", "/dev/dri/renderD129")
    assert accelerator.device == "/dev/dri/renderD129"
    with pytest.raises(UnavailableError, match=r"--hwaccel cuda:1: the device cannot be opened"):
        resolve_hwaccel("cuda:1")


@pytest.mark.skipif("drm" in list(decoding._list_built_kinds(av)), reason="PyAV decodes with DRM")
def test_required_device_that_does_not_decode_the_codec(real_video: Any) -> None:
    with pytest.raises(UnavailableError, match=r"^camera: drm does not decode this codec or profile\. "):
        open_container(av, str(real_video), "camera", Hwaccel("drm"))
    with open_container(av, str(real_video), "camera", Hwaccel("drm", is_required=False)) as container:
        next(container.decode(video=0))
        assert read_decoder(container.streams.video[0].codec_context, Hwaccel("drm", is_required=False)) == "cpu"
        assert read_decoder(container.streams.video[0].codec_context, None) == ""


def test_auto_without_a_device_decodes_on_the_cpu(real_video: Any) -> None:
    hwaccel = Hwaccel("cpu", is_required=False)
    with open_container(av, str(real_video), "camera", hwaccel) as container:
        assert next(container.decode(video=0)).width == 640
        assert read_decoder(container.streams.video[0].codec_context, hwaccel) == "cpu"


@pytest.mark.parametrize(("pix_fmt", "expected"), [("cuda", "cuda"), ("yuv420p", "cpu")])
def test_decoder_is_read_back_from_the_pixel_format(pix_fmt: str, expected: str) -> None:
    """After a fallback, PyAV still reports `is_hwaccel`."""
    config = SimpleNamespace(device_type=SimpleNamespace(name="cuda"), format=SimpleNamespace(name="cuda"))
    context = SimpleNamespace(is_hwaccel=True, pix_fmt=pix_fmt, codec=SimpleNamespace(hardware_configs=[config]))
    assert read_decoder(context, Hwaccel("cuda")) == expected


@pytest.mark.parametrize("source", ["0", "street.mp4", "images"])
def test_required_device_refuses_sources_of_opencv(source: str) -> None:
    with pytest.raises(UsageError, match=rf"--source {source}: expected a network camera with --hwaccel cuda\."):
        open_source(source, hwaccel=Hwaccel("cuda")).__enter__()


def test_required_device_refuses_jpeg(camera: Any) -> None:
    with pytest.raises(UnavailableError, match=r"the camera sends JPEG images, which cuda does not decode here\. Set"):
        open_source(camera.address, hwaccel=Hwaccel("cuda")).__enter__()
    with open_source(camera.address, hwaccel=Hwaccel("cuda", is_required=False)) as source:
        assert next(iter(source)).image_rgb.shape == (64, 96, 3)
        assert source.decoder == "cpu"


class ChangingReader:
    """Frames of a decoder that falls back to the CPU after ten."""

    fps = 25.0

    def __init__(self) -> None:
        self.number = 0

    @property
    def decoder(self) -> str:
        return "cuda" if self.number <= 10 else "cpu"

    def read(self) -> CameraFrame:
        time.sleep(0.02)
        self.number += 1
        return CameraFrame(lambda: np.zeros((4, 4, 3), np.uint8), time.monotonic())

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def changing_source() -> Iterator[LiveSource]:
    source = LiveSource("camera", ChangingReader, ReconnectPolicy())
    yield source
    source.close()


def test_decoder_of_a_source_is_that_of_the_last_frame(changing_source: LiveSource) -> None:
    frames = iter(changing_source)
    next(frames)
    assert changing_source.decoder == "cuda"
    deadline_s = time.monotonic() + 5
    while changing_source.decoder == "cuda" and time.monotonic() < deadline_s:
        next(frames)
    assert changing_source.decoder == "cpu"
