"""Two processes on the CPU: manual optimisation and two optimisers under DDP, stopping and resuming."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from command_line import ROOT, CommandLine, encdiff_config
from pytorch_lightning.callbacks import Callback
from resuming import assert_same_end, config_of, last
from torch.nn.parallel import DistributedDataParallel

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma


class SaveEachRank(Callback):
    """Saves every process's weights at the end of training, as `rank<n>.pt` in the working directory."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_one_first_stage(cli):
    """By Muon, whose steps each process computes from the common gradient."""
    process = cli.start("main.py", "--base", cli.vq, ROOT / "configs" / "muon.yaml", "-t", "--accelerator", "cpu",
                        "--devices", 2, "--strategy", "ddp", "--max_steps", 3, "--accumulate_grad_batches", 2,
                        "data.params.batch_size=4",
                        "lightning.callbacks.ranks.target=test_processes.SaveEachRank",
                        "--allow", "test_processes")  # fmt: skip
    result = cli.result(process, timeout=240)
    assert result.status == 0, result.err
    assert len(result.logdirs) == 1, "one log directory for both"
    assert "learning rate 1.60e-04 = 2 accumulated batches x 2 processes x batch size 4" in result.err
    a, b = (torch.load(cli.folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # Running means and variances are each process's own between two steps.
    assert all(torch.equal(a[name], b[name]) for name in a if "running" not in name)
    content = torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert "momentum" in content["optimizer_states"][0]["param_groups"][0]
    assert [list(a) == list(content["state_dict"]), result.err.count("building the model")] == [True, 1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_two_processes_stop_together_and_go_on(tmp_path, rooms, first_stage, stage):
    """A signal that one process gets stops both; two pieces end where a run in one piece ends, to the last bit."""
    cli = CommandLine(tmp_path, rooms)
    cli.write("run.yaml", config_of(stage, rooms, first_stage))
    two = ("-t", "--accelerator", "cpu", "--devices", 2, "--strategy", "ddp", "--max_steps", 3,
           "data.params.batch_size=8")  # fmt: skip
    signalled = "lightning.callbacks.signal"

    def run(*argv: object, status: int = 0) -> Path:
        result = cli.result(cli.start("main_val.py" if stage == "encdiff" else "main.py", *argv, *two), timeout=240)
        assert result.status == status, result.err
        return result.logdir

    whole = run("--base", "run.yaml", "-n", "whole")
    pieces = run("--base", "run.yaml", "-n", "pieces", f"{signalled}.target=run_callbacks.SignalAt",
                 f"{signalled}.params.batch=1", f"{signalled}.params.rank=1", status=130)  # fmt: skip
    assert last(pieces)["global_step"] == 2, "they stop one batch after the signal"
    assert run("-r", pieces, f"{signalled}.params.batch=1000") == pieces
    assert_same_end(whole, pieces, steps=3)
    scores = [sorted((logdir / "metrics").glob("*.json")) for logdir in (whole, pieces)]
    assert [path.read_text() for path in scores[0]] == [path.read_text() for path in scores[1]]
    assert len(scores[0]) == (1 if stage == "encdiff" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, rooms, first_stage, stage):
    """With synchronised batch norms: losses, whose mean the two have, and weights; the averages are the first one's."""
    cli = CommandLine(tmp_path, rooms)
    cli.write("run.yaml", config_of(stage, rooms, first_stage))
    callbacks = "lightning.callbacks"
    common = ("--base", "run.yaml", "-t", "--accelerator", "cpu", "--max_steps", 6, "--sync_batchnorm", "true",
              f"{callbacks}.noise.target=run_callbacks.NoiseOfRows",
              f"{callbacks}.trace.target=run_callbacks.Trace")  # fmt: skip
    if stage == "encdiff":
        common += ("model.params.scale_by_std=false", "model.params.scale_factor=0.7", "--limit_val_batches", 0)

    def run(folder: str, devices: int, batch_size: int) -> list[dict[str, Any]]:
        options = ("--devices", devices, "--strategy", "ddp" if devices > 1 else "auto", "-n", folder,
                   f"data.params.batch_size={batch_size}", f"{callbacks}.trace.params.folder={folder}")  # fmt: skip
        result = cli.result(cli.start("main.py", *common, *options), timeout=240)
        assert result.status == 0, result.err
        paths = sorted((cli.folder / folder).glob("rank*.pt"))
        return [torch.load(path, weights_only=True) for path in paths]

    def close(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")

    (one,), two = run("one", 1, 16), run("two", 2, 8)
    assert len(two) == 2 and len(one["losses"]) == 6
    for step, expected in enumerate(one["losses"]):
        for name, value in expected.items():
            found = sum(process["losses"][step][name] for process in two) / 2
            torch.testing.assert_close(
                found, value, rtol=1e-5, atol=1e-6, msg=lambda text, n=(step, name): f"{n}: {text}"
            )
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_ddp_does_not_broadcast_ema_weights(tmp_path):
    """It would broadcast every buffer before each forward pass; the batch statistics still are."""
    params = encdiff_config(tmp_path)["model"]["params"] | {"ema_parameters": "all"}
    params["first_stage_config"]["params"]["ckpt_path"] = None
    model = LatentDiffusion(**params)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        broadcast = {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}
    finally:
        torch.distributed.destroy_process_group()
    names = {name for name, buffer in model.named_buffers() if id(buffer) in broadcast}
    assert any("running_mean" in name for name in names) and not any("_ema." in name for name in names)


def _keeps_averages(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.zeros_(model.bias)
    ema = LitEma(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.weight.mul_(3.0 + rank)  # as a statistic of each process's own would differ
    ema(model)
    expected = 1.0 if rank else 1.0 + 2.0 * 9 / 11  # the first decay is 2/11
    torch.testing.assert_close(ema.weight, torch.full_like(ema.weight, expected))
    assert int(ema.num_updates) == 1 - rank
    ema.share()
    torch.testing.assert_close(ema.weight, torch.full_like(ema.weight, 1.0 + 2.0 * 9 / 11))
    assert int(ema.num_updates) == 1
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_first_process_keeps_the_averages(tmp_path):
    """The others get them when they need them."""
    torch.multiprocessing.spawn(_keeps_averages, args=(str(tmp_path / "store"),), nprocs=2)


@pytest.mark.slow
def test_torchrun(tmp_path, rooms):
    """Started by torchrun on CPUs, each process runs the whole command line; the first one's log directory counts."""
    cli = CommandLine(tmp_path, rooms)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "main.py"), "--base", cli.vq, "-t", "--accelerator", "cpu", "--devices", "2",
               "--strategy", "ddp", "--max_steps", "2", "data.params.batch_size=4"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (logdir,) = (tmp_path / "logs").iterdir()
    assert torch.load(logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "1 accumulated batches x 2 processes x batch size 4" in done.stderr
