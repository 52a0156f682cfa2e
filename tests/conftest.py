"""Fixtures of the command line's tests; what they are made of is in `command_line.py`."""

from command_line import cli, first_stage, rooms, trained, trained_encdiff

__all__ = ["cli", "first_stage", "rooms", "trained", "trained_encdiff"]
