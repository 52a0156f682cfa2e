"""Two processes on the CPU train one first stage: manual optimisation and two optimisers under DDP."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class SaveEachRank(Callback):
    """Saves every process's weights at the end of training, as `rank<n>.pt` in the working directory."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), f"rank{trainer.global_rank}.pt")


def test_two_processes_train_one_first_stage(cli):
    process = cli.start("main.py", "--base", cli.vq, "-t", "--accelerator", "cpu", "--devices", 2, "--strategy", "ddp",
                        "--max_steps", 3, "--accumulate_grad_batches", 2, "data.params.batch_size=4",
                        "lightning.callbacks.ranks.target=test_processes.SaveEachRank")  # fmt: skip
    result = cli.result(process, timeout=240)
    assert result.status == 0, result.err
    assert len(result.logdirs) == 1, "one log directory for both"
    assert "learning rate 1.60e-04 = 2 accumulated batches x 2 processes x batch size 4" in result.err
    a, b = (torch.load(cli.folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # Running means and variances are each process's own between two steps.
    assert all(torch.equal(a[name], b[name]) for name in a if "running" not in name)
    content = torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert [list(a) == list(content["state_dict"]), result.err.count("building the model")] == [True, 1]
