"""Fixtures of the command line's tests; what they are made of is in `command_line.py` and `resuming.py`."""

import pytest

pytest.register_assert_rewrite("resuming")

from command_line import cli, first_stage, rooms, trained, trained_encdiff  # noqa: E402 - after the line above
from resuming import runs, whole  # noqa: E402

__all__ = ["cli", "first_stage", "rooms", "runs", "trained", "trained_encdiff", "whole"]
