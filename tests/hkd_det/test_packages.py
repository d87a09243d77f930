"""A package that is missing, that lacks one of its own, or that does not load: each is one line with the remedy."""

from pathlib import Path

import pytest

from hkd_det.errors import UnavailableError, import_package


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Runtime is not installed; get it"),
        ("import packages_test_dependency", "does not load: No module named 'packages_test_dependency'; get it"),
        ("raise ImportError('lib.so: not there\\nin any of\\nthese')", "does not load: lib.so: not there; get it"),
        ("raise OSError('lib.so: wrong ELF class')", "does not load: lib.so: wrong ELF class; get it"),
    ],
)
def test_what_is_wrong_is_one_line(
    content: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "packages_test_runtime.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError) as caught:
        import_package("packages_test_runtime", "Runtime", "get it")
    assert str(caught.value).endswith(words) and "\n" not in str(caught.value)


def test_a_parent_that_is_missing_is_the_package() -> None:
    with pytest.raises(UnavailableError, match=r"^cuda is not installed; get it$"):
        import_package("packages_test_cuda.bindings.runtime", "cuda", "get it")
