"""A short round of scripts/soak_checkpoints.py: damaged files end in the right answer or in one clear error."""

import importlib.util

import pytest
from command_line import ROOT

_spec = importlib.util.spec_from_file_location("soak_checkpoints", ROOT / "scripts" / "soak_checkpoints.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.mark.slow
def test_thirty_damaged_files(tmp_path):
    found = script.soak(30, 1, tmp_path)
    assert len(found) == 30 and len({entry["damage"] for entry in found}) > 7
    assert [entry for entry in found if entry["outcome"] in script.FAULTS] == []
    assert {entry["outcome"] for entry in found} == {script.RIGHT, script.ERROR}
