"""Ultralytics' package, imported when a YOLO model is asked for and not before; it is AGPL-3.0 and an extra.

At import it asks a name server whether it is online, sets thread counts, print options and warning filters, and
replaces `torch.save` and `PIL.Image.open`. Here it is told that it is offline and to be quiet, and what it changed
outside itself is put back. Its settings file is the user's own and stays.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch

from hkd_det.errors import UnavailableError

# WORLD_SIZE: under torchrun its ranks would wait for one another, each at its own time.
QUIET_ENV = {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "WORLD_SIZE": "1"}


def import_tasks() -> Any:
    """`ultralytics.nn.tasks`, where its networks are built and read; UnavailableError without the package."""
    if "ultralytics.nn.tasks" not in sys.modules:
        with _preserve_global_state():
            _import_ultralytics()
    tasks: Any = sys.modules["ultralytics.nn.tasks"]
    if not hasattr(tasks, "SAFE_LOAD"):
        raise UnavailableError("this ultralytics is too old for hkd-det: pip install --upgrade 'hkd-det[yolo]'")
    return tasks


@contextmanager
def restrict_layer_types(tasks: Any) -> Iterator[None]:
    """Within, Ultralytics reads files without running code in them and builds networks of layers it knows.

    Both its files (pickles) and its network definitions (`activation` is given to `eval`) could otherwise run
    anything. TypeError for what is refused.
    """
    safe_globals, safe_load = torch.serialization.get_safe_globals(), tasks.SAFE_LOAD
    tasks.SAFE_LOAD = True
    try:
        yield
    finally:
        tasks.SAFE_LOAD = safe_load
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe_globals)


def _import_ultralytics() -> None:
    try:
        import ultralytics.nn.tasks  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UnavailableError(
            f"{package} is not installed; YOLO models need: pip install 'hkd-det[yolo]' (AGPL-3.0)"
        ) from None


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    environment, threads, printing = dict(os.environ), cv2.getNumThreads(), np.get_printoptions()
    save, open_picture = torch.save, PIL.Image.open
    os.environ.update(QUIET_ENV)
    try:
        with warnings.catch_warnings(), torch._tensor_str.printoptions():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        cv2.setNumThreads(threads)
        np.set_printoptions(**printing)
        torch.save, PIL.Image.open = save, open_picture
