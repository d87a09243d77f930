"""Ask a Triton server for the people in a picture, in the KServe v2 protocol over HTTP.

    python deploy/triton/client.py street.jpg --model student --url http://localhost:8000

Prints a line a person: x1 y1 x2 y2 in pixels of the picture, and the score. The tensors go as they are behind the
JSON (the protocol's binary extension): a picture as JSON numbers would be four times as large, and slow to read.
Needs hkd-det's base install only.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from hkd_det.datasets import read_image
from hkd_det.errors import DataError, UnavailableError, run_command
from hkd_det.letterbox import Letterbox
from hkd_det.structures import Detections

HEADER_LENGTH = "Inference-Header-Content-Length"
KSERVE_DTYPES: dict[str, type[np.generic]] = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
REQUEST_TIMEOUT_S = 30.0


def request_detections(url: str, model: str, image_rgb: NDArray[np.uint8]) -> Detections:
    """People in one picture, uint8 RGB (H, W, 3): boxes in its pixels.

    Raises UnavailableError if the server does not answer, DataError if it answers something else.
    """
    address = f"{url.rstrip('/')}/v2/models/{model}"
    try:
        return _request_detections(address, image_rgb)
    except (KeyError, ValueError) as error:
        raise DataError(f"{address}: does not answer as a detector of hkd-export does: {error!r}") from None


def _request_detections(address: str, image_rgb: NDArray[np.uint8]) -> Detections:
    (images,) = _send_http_request(requests.get, address).json()["inputs"]
    height, width = images["shape"][1:3]
    if images["datatype"] != "UINT8" or height < 1 or width < 1:
        raise DataError(f"{address}: takes {images}; this client sends uint8 pictures of one size")
    letterbox = Letterbox((image_rgb.shape[0], image_rgb.shape[1]), (height, width))
    tensors = _send_infer_request(f"{address}/infer", letterbox.apply(image_rgb)[None])
    found = int(tensors["count"].ravel()[0])
    return Detections(letterbox.boxes_to_source(tensors["boxes"][0, :found]), tensors["scores"][0, :found])


def _send_infer_request(address: str, batch: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    pixels = batch.tobytes()
    images = {
        "name": "images",
        "shape": list(batch.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(pixels)},
    }
    head = json.dumps({"inputs": [images], "parameters": {"binary_data_output": True}}).encode()
    answer = _send_http_request(requests.post, address, data=head + pixels, headers={HEADER_LENGTH: str(len(head))})
    length = int(answer.headers[HEADER_LENGTH])
    described, rest = json.loads(answer.content[:length])["outputs"], memoryview(answer.content)[length:]
    tensors = {}
    for output in described:  # one behind the other, in the order of the JSON
        size = output["parameters"]["binary_data_size"]
        tensors[output["name"]] = np.frombuffer(rest[:size], KSERVE_DTYPES[output["datatype"]]).reshape(output["shape"])
        rest = rest[size:]
    return tensors


def _send_http_request(http_method: Any, address: str, **kwargs: Any) -> requests.Response:
    try:
        answer: requests.Response = http_method(address, timeout=REQUEST_TIMEOUT_S, **kwargs)
    except requests.RequestException as error:
        raise UnavailableError(
            f"{address}: no answer ({type(error).__name__}); is tritonserver running there?"
        ) from None
    if not answer.ok:
        raise UnavailableError(f"{address}: {answer.status_code} {answer.text.strip()[:300]}")
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """The script's entry; returns its exit code."""
    return run_command("client.py", _run_client_command, argv)


def _run_client_command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description="Ask a Triton server for the people in a picture.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="student", help="its name in the repository (default: %(default)s)")
    parser.add_argument("--url", default="http://localhost:8000", help="default: %(default)s")
    parser.add_argument("--conf", type=float, default=0.3, help="least score printed (default: %(default)s)")
    flags = parser.parse_args(argv)
    found = request_detections(flags.url, flags.model, read_image(flags.picture))
    for (x1, y1, x2, y2), score in zip(found.boxes_xyxy, found.scores, strict=True):
        if score >= flags.conf:
            print(f"{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {score:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
