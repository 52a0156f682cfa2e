"""Losses as a table in the log directory."""

import resource

import pytest
import torch

from ldm.callbacks.record import Record
from ldm.util import UserError


def test_record_continues_where_a_run_stopped(tmp_path):
    record = Record(every_step_num=2)
    record.start(tmp_path, 0)
    for step in (1, 2, 2, 4, 6):  # accumulated batches share a step
        record.log(tmp_path, {"train/loss": torch.tensor(step / 2)}, step)
    record.start(tmp_path, 4)
    record.log(tmp_path, {"train/loss": torch.tensor(9.0)}, 4)
    record.log(tmp_path, {"train/loss": torch.tensor(9.0)}, 6)
    assert (tmp_path / "record.csv").read_text().split() == ["step,train/loss", "2,1.0", "4,2.0", "6,9.0"]
    record.start(tmp_path, 0)
    assert (tmp_path / "record.csv").read_text() == ""


def test_a_full_disk_leaves_whole_rows(tmp_path):
    record = Record(every_step_num=1)
    record.log(tmp_path, {"train/loss": torch.tensor(0.5)}, 1)
    before = (tmp_path / "record.csv").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*record\.csv"):
            record.log(tmp_path, {"train/loss": torch.tensor(0.25)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "record.csv").read_text() == before
