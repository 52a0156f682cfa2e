"""A training step reads nothing back from the device, which would wait for it, and copies nothing there.

Tested on a CPU: what would read from a GPU reads here, too, and tensors made of Python's numbers would be copied.
"""

import traceback
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from command_line import CHECKPOINT
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from test_training import encdiff, kl, loader, vq
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.losses.lpips import LPIPS

# Their result is a number on the host, or has a size that depends on the values.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
         "unique_consecutive", "bincount", "repeat_interleave")  # fmt: skip
# Python's numbers, lists or arrays become a tensor.
COPIES = ("lift_fresh",)
METHODS = ("cpu", "cuda", "tolist", "numpy", "__array__")  # a CPU has nothing to do for these
# Without a device they make a tensor on the host.
FACTORIES = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm")
WARM_UP = {"warm_up_steps": [3], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
SCHEDULE = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": WARM_UP}


class Watch:
    """Notes what would read from a device or copy to it inside the block, with the line of code.

    Attributes:
        reads, copies: lines such as `aten::lift_fresh at model.py:12`.
        host: addresses of tensors that are on the host in any case.
    """

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.host: set[int] = set()
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> "Watch":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, notes: list[str], name: str) -> None:
        """Keep an operation with the innermost lines outside PyTorch and this file."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        notes.append(f"{name} at " + " < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames[:-4:-1]))


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (masked and not _fills(name, args)) or (name in READS and args[0].data_ptr() not in self.watch.host):
            self.watch.note(self.watch.reads, name)
        if name in COPIES:
            self.watch.note(self.watch.copies, name)
        return function(*args, **(kwargs or {}))


def _fills(name: str, args: Any) -> bool:
    """Whether a mask selects where one number goes: that needs no list of positions."""
    return name != "index" and args[2].numel() == 1


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = [*args[1:], *kwargs.values()] if name == "to" else []
        moves = any(isinstance(value, str | torch.device) for value in given)
        if (name in METHODS or moves) and function is getattr(torch.Tensor, name, None):
            self.watch.note(self.watch.reads, name)
        if name in FACTORIES and kwargs.get("device") is None:
            self.watch.note(self.watch.copies, name)
        return function(*args, **kwargs)


class WatchSteps(Callback):
    """Watches batches 2 and 3 from the hook before the step: nothing is set up there for the first time.

    Args:
        whole: also what comes between the two, such as the loggers and the progress bar.
    """

    def __init__(self, whole: bool = False) -> None:
        self.watch, self.whole, self.batches = Watch(), whole, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.whole and batch_idx == 3:
            self.watch.__exit__(None, None, None)
            latest.append(self.watch)
        elif batch_idx == 1 or (batch_idx == 2 and not self.whole):
            # Unless it is fused, an optimiser counts its steps on the host.
            states = [(o, state) for o in trainer.optimizers for state in o.state.values()]
            self.watch.host = {s["step"].data_ptr() for o, s in states if not o.param_groups[0].get("fused")}
            self.watch.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (1, 2):
            self.batches += 1
            if not self.whole:
                self.watch.__exit__(None, None, None)


latest: list[Watch] = []  # of runs of the command line


def build(name: str) -> Any:
    """A tiny model of each kind, with everything on that its step can do."""
    torch.manual_seed(0)
    if name == "encdiff":
        return encdiff(ema_parameters="all", cache_latents=True, scheduler_config=SCHEDULE)
    if name == "encdiff, first stage in each step":
        return encdiff(learn_logvar=True, original_elbo_weight=0.1)
    return {"vq": vq, "kl": kl}[name]()


def fit(model: Any, callback: Callback, **options: Any) -> None:
    """Four batches."""
    options = {"logger": False, "log_every_n_steps": 100, **options}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[callback], **options)  # fmt: skip
    trainer.fit(model, loader(4))


def reads_of_values(watch: Watch) -> list[str]:
    """Without Lightning's calls of `to`, which bring values to the device where they are already, and batches to it."""
    return [read for read in watch.reads if not read.startswith("to at ") or "lightning" not in read]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["vq", "kl", "encdiff", "encdiff, first stage in each step"])
def test_our_step_neither_reads_nor_copies(name, precision):
    """Forward and backward passes, optimisers, schedules and EMA; Lightning's log is replaced by a list."""
    model, steps, logged = build(name), WatchSteps(), []
    model.log = model.log_dict = lambda *args, **kwargs: logged.append(args)
    fit(model, steps, precision=precision)
    assert steps.batches == 2 and len(logged) >= 8
    assert (steps.watch.reads, steps.watch.copies) == ([], [])


def test_lpips_neither_reads_nor_copies(tmp_path):
    """The distance that the first stage's loss takes, forward and backward."""
    torch.save(torchvision.models.vgg16(weights=None).features.state_dict(prefix="features."), tmp_path / "vgg.pth")
    distance = LPIPS(tmp_path / "vgg.pth", dropout=True).train()
    x, y = torch.rand(2, 1, 3, 16, 16).requires_grad_()
    with Watch() as watch:
        distance(x, y).mean().backward()
    assert (watch.reads, watch.copies) == ([], [])


@pytest.mark.parametrize("name", ["vq", "encdiff"])
@pytest.mark.parametrize("interval", [100, 1])
def test_lightning_reads_only_what_it_logs(tmp_path, name, interval):
    """Between two intervals of `log_every_n_steps` nothing; at one, every value once."""
    steps = WatchSteps(whole=True)
    fit(build(name), steps, log_every_n_steps=interval, logger=CSVLogger(tmp_path))
    reads = reads_of_values(steps.watch)
    assert steps.batches == 2 and bool(reads) == (interval == 1), reads


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_nothing_reads_in_a_run_of_the_command_line(cli, first_stage, stage):
    """With the callbacks of a real run: bar, pictures, seeds, signals and checkpoints."""
    latest.clear()
    pictures = "lightning.callbacks.image_logger.params"
    weights = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else ["model.params.use_ema=true"]
    weights += [f"{pictures}.increase_log_steps=false", f"{pictures}.batch_frequency=1000"]
    watch = ("lightning.callbacks.watch.target=test_no_sync.WatchSteps", "lightning.callbacks.watch.params.whole=true",
             "lightning.callbacks.progress_bar.params.seconds=3600", "--allow", "test_no_sync",
             "--log_every_n_steps", 100)  # fmt: skip
    result = cli.run("--base", getattr(cli, "vq" if stage == "vq" else "enc"), "-t", "--gpus", 0, *weights, *watch,
                     "data.params.batch_size=8", "--max_epochs", 1)  # fmt: skip
    assert result.status == 0, result.err
    assert len(latest) == 1 and reads_of_values(latest[0]) == []


@pytest.mark.parametrize("act", [
    lambda x, mask: float(x.sum()), lambda x, mask: x[mask], lambda x, mask: x.nonzero(), lambda x, mask: x.cpu(),
    lambda x, mask: x.sum().item(), lambda x, mask: x.tolist(), lambda x, mask: x.numpy(),
    lambda x, mask: 1 if x.sum() > 0 else 0, lambda x, mask: x.to("cpu"), lambda x, mask: torch.equal(x, x),
])  # fmt: skip
def test_a_read_is_noticed(act):
    x = torch.ones(3)
    with Watch() as watch:
        act(x, x > 0)
    assert watch.reads


@pytest.mark.parametrize("act", [
    lambda x: torch.tensor(1.0), lambda x: torch.as_tensor([1, 2]), lambda x: x[[0, 2]],
    lambda x: x * torch.tensor(2.0, device=x.device), lambda x: torch.zeros(()).to(x) + x,
    lambda x: x.__setitem__(torch.arange(2), 1.0),
])  # fmt: skip
def test_a_copy_is_noticed(act):
    x = torch.ones(3)
    with Watch() as watch:
        act(x)
    assert watch.copies


def test_what_stays_on_the_device_is_not_noticed():
    x = torch.ones(3, requires_grad=True)
    with Watch() as watch:
        y = torch.where(x > 0, x, 0.0) * 2.0 + torch.full_like(x, 1.0) + x.new_zeros(3) + x.to(torch.bfloat16)
        y[torch.arange(2, device=x.device)].sum().backward()
    assert (watch.reads, watch.copies) == ([], [])
