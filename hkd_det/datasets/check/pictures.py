"""Every picture opened and decoded: what can't be read is told now, not in the night of a training."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from hkd_det.datasets.faults import ErrorHandler
from hkd_det.datasets.sample import Sample, read_image
from hkd_det.errors import DataError

NUM_THREADS = 4  # decoding leaves Python's lock


def validate_images(samples: Sequence[Sample], on_error: ErrorHandler) -> list[tuple[int, int] | None]:
    """(height, width) of every picture, in order, None for one that can't be read.

    A size that the annotations state wrongly is a fault too.
    """
    sizes: list[tuple[int, int] | None] = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        found = pool.map(_read_size_or_error, samples)
        progress = tqdm(found, desc="decode", total=len(samples), unit="picture", leave=False, delay=2)
        for sample, size in zip(samples, progress, strict=True):
            if isinstance(size, DataError):
                on_error(size)
                sizes.append(None)
                continue
            if sample.size_hw is not None and sample.size_hw != size:
                stated = f"{sample.size_hw[1]} x {sample.size_hw[0]}"
                on_error(DataError(f"{sample.path}: is {size[1]} x {size[0]} pixels, its annotation says {stated}"))
            sizes.append(size)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the thousands in the queue
    return sizes


def _read_size_or_error(sample: Sample) -> tuple[int, int] | DataError:
    try:
        height, width = read_image(sample.path).shape[:2]
    except DataError as fault:
        return fault
    except OSError as error:
        return DataError(f"{sample.path}: {error.strerror or error}")
    return height, width
