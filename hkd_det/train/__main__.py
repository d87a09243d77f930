"""Entry point for torchrun: `torchrun -m hkd_det.train --data ...`."""

from hkd_det.train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
