"""Distill a student: `python examples/distill_student.py DATA.yaml TEACHER.pt SAVE_DIR`."""

import sys

from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import train


def main(data: str, teacher: str, save_dir: str, epochs: str = "12") -> None:
    """Train mini-student with hierarchical distillation and a noisy teacher."""
    config = TrainConfig.from_dict(
        {
            "data": data,
            "model": "mini-student",
            "save_dir": save_dir,
            "imgsz_hw": [256, 512],
            "epochs": int(epochs),
            "batch": 4,
            "teacher": teacher,
            "distill": {"hkd": {}, "noisy_teacher": {}},
        }
    )
    result = train(config)
    print(f"{result.best}: MR^-2 {100 * result.miss_rate:.2f} %")


if __name__ == "__main__":  # data loading processes import this file
    main(*sys.argv[1:])
