"""Fixtures of the command line's tests, what they are made of is in `command_line.py` and `resuming.py`; and classes
of tests."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("resuming")

from command_line import cli, first_stage, rooms, trained, trained_encdiff  # noqa: E402 - after the line above
from resuming import runs, whole  # noqa: E402

from ldm.targets import allowing  # noqa: E402

__all__ = ["cli", "first_stage", "rooms", "runs", "trained", "trained_encdiff", "whole"]


@pytest.fixture
def own_classes(request) -> Iterator[None]:
    """Targets may name classes of the test's own file."""
    with allowing(request.module.__name__):
        yield
