"""Pictures a second of the synthetic street, drawn and written to disk."""

import tempfile
import time
from pathlib import Path

from hkd_det.datasets.synthetic import write_synthetic_dataset

PICTURES = 200

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        write_synthetic_dataset(Path(folder) / "street", PICTURES, 0, num_workers=2)
        elapsed_s = time.monotonic() - started
    print(f"{PICTURES} pictures of 1024x512, two processes: {PICTURES / elapsed_s:.1f} pictures/s, start-up included")
