"""The Python example of docs/how-to/distill.md, as a script and as imported by the processes that it starts."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hkd_det.distill import parse_methods
from hkd_det.train import trainer
from hkd_det.train.config import TrainConfig

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "distill.md"


@pytest.mark.parametrize(("name", "num_runs"), [("__main__", 1), ("__mp_main__", 0)])
def test_documented_example_trains_in_main_process_only(
    name: str, num_runs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spawned processes that load images import the script under the name __mp_main__."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr(trainer, "train", lambda config: configs.append(config) or SimpleNamespace(miss_rate=0.5))
    match = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    exec(compile(match[1], str(PAGE), "exec"), {"__name__": name})
    assert len(configs) == num_runs and capsys.readouterr().out.split() == ["0.5"] * num_runs
    assert all(c.distill == parse_methods({"hkd": {}, "mokd": {}}) and c.workers > 0 for c in configs)
