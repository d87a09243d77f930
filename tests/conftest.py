"""For every test: Ctrl-C works in the processes they start."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A job started in the background ignores SIGINT, and so would all its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
