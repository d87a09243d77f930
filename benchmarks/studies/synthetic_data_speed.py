"""Measure how many synthetic images per second two processes render and write to disk.

python benchmarks/studies/synthetic_data_speed.py
"""

import tempfile
import time
from pathlib import Path

from hkd_det.datasets.synthetic import write_synthetic_dataset

NUM_IMAGES = 200

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        start_time = time.monotonic()
        write_synthetic_dataset(Path(folder) / "street", NUM_IMAGES, 0, num_workers=2)
        elapsed_s = time.monotonic() - start_time
    print(f"{NUM_IMAGES} images of 1024x512, two processes, start included: {NUM_IMAGES / elapsed_s:.1f} images/s")
