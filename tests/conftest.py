"""Settings for all tests."""

import signal

import pytest

DOWNLOADING_FIXTURES = {"tensorrt_python", "triton_proto"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow whose fixtures download packages: the fast tests install nothing.

    They run in one worker of `--dist loadgroup`, because two would download at the same time.
    """
    for item in items:
        if DOWNLOADING_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("downloads"))


@pytest.fixture(autouse=True, scope="session")
def _sigint_raises_keyboard_interrupt() -> None:
    """Restore the default handler: child processes of a background job would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
