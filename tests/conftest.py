"""Fixtures of the command line's tests, what they are made of is in `command_line.py`; and classes of tests."""

from collections.abc import Iterator

import pytest
from command_line import cli, first_stage, rooms, trained, trained_encdiff

from ldm.targets import allowing

__all__ = ["cli", "first_stage", "rooms", "trained", "trained_encdiff"]


@pytest.fixture
def own_classes(request) -> Iterator[None]:
    """Targets may name classes of the test's own file."""
    with allowing(request.module.__name__):
        yield
