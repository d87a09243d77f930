"""Exit codes of commands, and errors of optional packages."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from hkd_det.errors import DataError, UnavailableError, UsageError, import_package, run_command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x: no"), 2, "hkd: --x: no"),
        (DataError("a.jpg: broken"), 1, "hkd: a.jpg: broken"),
        (
            OSError(28, "No space left on device", "b.pt"),
            1,
            "hkd: b.pt: No space left on device. Check the path, its permissions and the free disk space.",
        ),
        (KeyboardInterrupt(), 130, "hkd: interrupted"),
    ],
)
def test_command_ends_with_one_line_and_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(_argv: Sequence[str] | None) -> int:
        raise error

    assert run_command("hkd", body, []) == code
    assert capsys.readouterr().err.strip() == line


def test_programming_errors_are_not_hidden() -> None:
    def body(_argv: Sequence[str] | None) -> int:
        return int(math.sqrt(-1))

    with pytest.raises(ValueError):
        run_command("hkd", body, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Runtime: not installed. Get it."),
        ("import packages_test_dependency", "does not load: No module named 'packages_test_dependency'. Get it."),
        ("raise ImportError('lib.so: not there\\nin any of\\nthese')", "does not load: lib.so: not there. Get it."),
        ("raise OSError('lib.so: wrong ELF class')", "does not load: lib.so: wrong ELF class. Get it."),
    ],
)
def test_package_that_does_not_load_is_one_line(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "packages_test_runtime.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError) as caught:
        import_package("packages_test_runtime", "Runtime", "Get it.")
    assert str(caught.value).endswith(message) and "\n" not in str(caught.value)


def test_missing_parent_package_counts_as_not_installed() -> None:
    with pytest.raises(UnavailableError, match=r"^cuda: not installed\. Get it\.$"):
        import_package("packages_test_cuda.bindings.runtime", "cuda", "Get it.")


def test_default_hint_names_the_bench_extra() -> None:
    with pytest.raises(UnavailableError, match=r"^packages_test_plots: not installed\. .*'hkd-det\[bench\]'\.$"):
        import_package("packages_test_plots")
