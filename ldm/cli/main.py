"""The command line: parse -> configure -> build -> fit, each once.

PyTorch and Lightning, whose import takes seconds, are imported where `build` begins: help, and most mistakes, come
before it.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.bars import above, log_to_screen
from ldm.callbacks.log_file import LogFile, note
from ldm.cli.arguments import Arguments, parse
from ldm.cli.configure import Run, configure, logdir_of
from ldm.signals import Stopped, handled, state
from ldm.targets import allowing
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.cli.build import Job

log = logging.getLogger(__name__)

# Environment variables that number the processes of a run, as Lightning reads them.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Advice of the libraries that does not apply here.
QUIET = (
    ".*does not have many workers.*",  # batches come whole from a memory map
    ".*LeafSpec.*",  # a notice for Lightning's developers
    r".*module\(s\) in eval mode at the start of training.*",  # the first stage is frozen
    ".*could not find the monitored key.*",  # in an epoch that a signal cut short; otherwise it was checked
    ".*exists and is not empty.*",  # a resumed run's checkpoints
    ".*It is recommended to use .*sync_dist=True.*",  # training losses are the first process's
    r".*torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # Lightning's own call
    ".*Please add the following callbacks.*RandomState.*",  # of an earlier version's checkpoints
    ".*You have overridden `on_before_batch_transfer` in `LightningModule` but.*",  # the data module has none
    ".*The dirpath has changed from.*",  # --resume_from_checkpoint continues in a new directory
    ".*is smaller than the logging interval.*",  # a short run is not wrong
)
# Messages of Lightning's that say nothing, or what is said here in other words.
SILENT = re.compile(
    r"For seamless cloud"  # an advertisement
    r"|^(GPU|TPU|IPU|HPU) available|^LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES"  # `model_in_words` names the device
    r"|`Trainer\.fit` stopped: `max_"  # `closing` says where it ended
    r"|^Restoring states from|^Restored all states from|^Loaded model weights from"
)
SPEAKERS = ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda")


def main(argv: Sequence[str] | None = None, score: bool = False, summary: bool = True) -> int:
    """Entry point of `main.py` and, with `score`, of `main_val.py`.

    Args:
        argv: the command line; by default this process's.
        score: with scores at validation.
        summary: say at the end where everything is, and what to do next.

    Returns:
        The exit status: 0; 2 after a mistake in the input; 128 + N after signal N.
    """
    set_up_logging()
    with handled(), LogFile(wanted=not is_follower()):
        return run_all(sys.argv[1:] if argv is None else argv, score, summary)


def run_all(argv: Sequence[str], score: bool, summary: bool) -> int:
    """Run all phases, and report a mistake or a stop in one line.

    Returns:
        The exit status.
    """
    arguments: Arguments | None = None
    debug = "-d" in argv or "--debug" in argv
    try:
        arguments = parse(argv)
        options = arguments.options
        # The run that is resumed may be somebody else's: what lies in its folder is not taken.
        resumed = logdir_of(Path(options.resume)) if options.resume else None
        with allowing(options.allow, working_directory=True, outside=resumed):
            return build_and_fit(configure(arguments), score, summary)
    except UserError as error:
        if debug:
            raise
        # A key that was given by a flag is reported by the flag's name; so is an unknown node above it.
        unknown, given = error.message.startswith("unknown key"), {} if arguments is None else arguments.flags
        flags = [f for k, f in given.items() if k == error.key or (unknown and k.startswith(f"{error.key}."))]
        report(f"error: {flags[0]}: {error.message}" if flags else f"error: {error}")
        return 2
    except Stopped as stop:
        return stopped(stop, arguments)
    except OSError as error:
        if debug:
            raise
        report(f"error: {error}")
        return 2
    except Exception:
        if debug:
            import pdb

            pdb.post_mortem()
        raise


def build_and_fit(run: Run, score: bool, summary: bool) -> int:
    """Phases 3 and 4.

    Returns:
        The exit status, 0.

    Raises:
        UserError: a mistake in the input.
    """
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.cli.build import build

    try:
        fit(build(run, score), summary)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if not peer_is_lost(error):
            raise
        hint = f"what it said is above; resume with -r {run.logdir}"
        raise UserError(f"another process of this run has ended, and this one cannot go on: {hint}") from error
    return 0


def peer_is_lost(error: RuntimeError) -> bool:
    """Whether an operation of several processes failed because one of them is gone."""
    from torch import distributed

    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return several and re.search(r"gloo|NCCL|Connection (closed|reset)|Broken pipe", str(error)) is not None


def stopped(stop: Stopped, arguments: Arguments | None) -> int:
    """Say on the first process what was saved; gives the exit status."""
    saved = getattr(stop, "checkpoint", None)
    allowed = "".join(f" --allow {module}" for module in arguments.options.allow) if arguments else ""
    line = (
        f"stopped; saved {saved}. Resume with -r {saved.parent.parent}{allowed}" if saved else "stopped; nothing saved"
    )
    if not saved and arguments is not None and arguments.options.resume:
        line = f"stopped; nothing new to save. Resume with -r {arguments.options.resume}{allowed}"
    if not is_follower():
        report(line)
    return stop.status


def fit(job: "Job", summary: bool) -> None:
    """Phase 4, fit: train, then test where there is a test set.

    Before the first step Lightning calls, in this order: `SetupCallback.on_fit_start` (makes the log directory),
    `StopCallback.on_fit_start` (signals), the model's `on_train_start` (cached latents), `SeedEachBatch` (random
    numbers), the model's `on_train_batch_start` (scale factor), and its `training_step`.

    Raises:
        Stopped: by a signal; `Interrupted` where there is a checkpoint.
    """
    from ldm.callbacks.setup import hold
    from ldm.callbacks.stop import Interrupted
    from ldm.callbacks.summary import closing

    def tell(ended: bool) -> None:
        if summary and run.logdir.is_dir():
            log.info("%s", "\n".join(["", *closing(job.trainer, run.logdir, run.argv, ended)]))

    run, checkpoint = job.run, str(job.run.checkpoint) if job.run.checkpoint else None
    if run.train:
        log.info("logging to %s", run.logdir)
        with hold(run.logdir, run.resumed and not is_follower()):
            try:
                job.trainer.fit(job.model, job.data, ckpt_path=checkpoint, weights_only=True)
            except Interrupted as stop:
                if stop.checkpoint is not None:
                    tell(ended=False)
                raise
        if state.stop is not None:  # it came when there was nothing left to train
            tell(ended=False)
            raise Interrupted(state.stop, run.logdir / "checkpoints" / "last.ckpt")
    else:
        log.info("built everything; add -t to train")
    if "test" in job.datasets and run.test:
        checkpoint = None if run.train else checkpoint
        results = job.trainer.test(job.model, job.data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        for name, value in results[0].items():
            log.info("%s %.5g", name, value)
    if run.train:
        tell(ended=True)


def is_follower() -> bool:
    """Whether this is not the first process of a run on several devices."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(getattr(lightning, "rank_zero_only", None), "rank", None)
    if rank is None:  # Lightning is not imported yet; these are where it looks
        rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    return rank > 0


def set_up_logging() -> None:
    """Messages on stderr, from the first process only, without advice that does not apply."""
    log_to_screen(logging.ERROR if is_follower() else logging.INFO)
    for lightning in map(logging.getLogger, SPEAKERS):
        if not lightning.filters:
            lightning.addFilter(lambda record: SILENT.search(record.getMessage()) is None)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)


def report(line: str) -> None:
    """One line on stderr and in the log file, however long the message."""
    with above():
        sys.stderr.write(f"{' '.join(line.split())}\n")
    note(" ".join(line.split()))
