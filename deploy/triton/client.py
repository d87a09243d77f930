"""Request detections from a Triton server with the KServe v2 protocol over HTTP.

    python deploy/triton/client.py street.jpg --model student --url http://localhost:8000

Prints one line per person: x1 y1 x2 y2 in image pixels and the score. Tensors are sent in binary after the JSON header
(the binary tensor data extension of the protocol): JSON numbers would be four times as large and slow to parse.
Requires only the base install of hkd-det.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range
from hkd_det.errors import DataError, UnavailableError, UsageError, run_command
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.structures import Detections

HEADER_LENGTH = "Inference-Header-Content-Length"
KSERVE_DTYPES: dict[str, type[np.generic]] = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
REQUEST_TIMEOUT_S = 30.0


def request_detections(url: str, model: str, image_rgb: NDArray[np.uint8]) -> Detections:
    """Request the detections of one image.

    Args:
        url: Address of the server.
        model: Name of the model in the repository of the server.
        image_rgb (uint8[H, W, 3]): RGB image of any size.

    Returns:
        Detections in image pixels.

    Raises:
        DataError: The model is not a detector of `hkd-export`.
        UnavailableError: The server does not respond.
    """
    address = f"{url.rstrip('/')}/v2/models/{model}"
    try:
        return _request_detections(address, image_rgb)
    except (KeyError, ValueError) as error:
        raise DataError(f"{address}: expected the response of a detector of hkd-export, got {error!r}.") from None


def _request_detections(address: str, image_rgb: NDArray[np.uint8]) -> Detections:
    _, content = _send_http_request(address)
    (images,) = json.loads(content)["inputs"]
    height, width = images["shape"][1:3]
    if images["datatype"] != "UINT8" or height < 1 or width < 1:
        raise DataError(f"{address}: expected a uint8 input of fixed size, got {images}.")
    letterbox = Letterbox((image_rgb.shape[0], image_rgb.shape[1]), (height, width))
    tensors = _send_infer_request(f"{address}/infer", letterbox.apply(image_rgb)[None])
    num_valid = int(tensors["count"].ravel()[0])
    return Detections(letterbox.boxes_to_source(tensors["boxes"][0, :num_valid]), tensors["scores"][0, :num_valid])


def _send_infer_request(address: str, batch: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    pixels = batch.tobytes()
    images = {
        "name": "images",
        "shape": list(batch.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(pixels)},
    }
    header = json.dumps({"inputs": [images], "parameters": {"binary_data_output": True}}).encode()
    response_headers, content = _send_http_request(address, header + pixels, {HEADER_LENGTH: str(len(header))})
    header_length = int(response_headers[HEADER_LENGTH])
    outputs, data = json.loads(content[:header_length])["outputs"], memoryview(content)[header_length:]
    tensors = {}
    for output in outputs:  # the binary data has the order of the JSON header
        size = output["parameters"]["binary_data_size"]
        tensors[output["name"]] = np.frombuffer(data[:size], KSERVE_DTYPES[output["datatype"]]).reshape(output["shape"])
        data = data[size:]
    return tensors


def _send_http_request(
    address: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[Mapping[str, str], bytes]:
    """Send a POST request with `data`, or a GET request without. Return headers and content of the response."""
    try:
        with urlopen(Request(address, data, dict(headers or {})), timeout=REQUEST_TIMEOUT_S) as response:
            return response.headers, response.read()
    except HTTPError as error:
        text = error.read().decode(errors="replace").strip()[:300]
        raise UnavailableError(
            f"{address}: HTTP status {error.code}: {text}. Check --url and the log of the server."
        ) from None
    except (URLError, OSError) as error:
        raise UnavailableError(f"{address}: no response ({error}). Check that tritonserver is running.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Arguments. None for those of the process.

    Returns:
        The exit code.
    """
    return run_command("client.py", _run_client_command, argv)


def _run_client_command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description="Request the detections of an image from a Triton server.")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--model", default="student", help="model name in the repository (default: %(default)s)")
    parser.add_argument("--url", default="http://localhost:8000", help="address of the server (default: %(default)s)")
    parser.add_argument(
        "--conf", type=float, default=0.3, help="minimum score of printed boxes, 0 to 1 (default: %(default)s)"
    )
    flags = parser.parse_args(argv)
    if not flags.url.startswith(("http://", "https://")):
        raise UsageError(f"--url {flags.url}: expected an http:// or https:// address. Example: http://localhost:8000.")
    check_range("--conf", flags.conf, 0, 1)
    detections = request_detections(flags.url, flags.model, read_image(flags.image))
    for (x1, y1, x2, y2), score in zip(detections.boxes_xyxy, detections.scores, strict=True):
        if score >= flags.conf:
            print(f"{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {score:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
