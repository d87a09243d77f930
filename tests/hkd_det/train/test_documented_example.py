"""The Python example of docs/distillation.md, as a script's own process and as the processes that it starts run it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hkd_det.distill.methods import DistillConfig
from hkd_det.train import trainer as run
from hkd_det.train.config import TrainConfig

DOC = Path(__file__).parents[3] / "docs" / "distillation.md"


@pytest.mark.parametrize(("name", "trained"), [("__main__", 1), ("__mp_main__", 0)])
def test_the_example_trains_in_its_own_process_alone(
    name: str, trained: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures are loaded by spawned processes, which import the script under the name __mp_main__."""
    asked: list[TrainConfig] = []
    monkeypatch.setattr(run, "train", lambda config: asked.append(config) or SimpleNamespace(miss_rate=0.5))
    found = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    exec(compile(found[1], str(DOC), "exec"), {"__name__": name})
    assert len(asked) == trained and capsys.readouterr().out.split() == ["0.5"] * trained
    assert all(config.distill == DistillConfig.from_names("hkd,mokd") and config.workers > 0 for config in asked)
