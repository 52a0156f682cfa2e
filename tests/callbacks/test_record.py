"""Losses as a table in the log directory."""

import torch

from ldm.callbacks.record import Record


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
