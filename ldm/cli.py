"""The command line: arguments -> configuration -> data, model, trainer -> training."""

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks.stop import Interrupted
from ldm.cli_arguments import Run, apply_flags, locate_run, parse, set_token_num
from ldm.cli_build import build_callbacks, configure_manual_optimization, lightning_nodes, set_learning_rate
from ldm.cli_checks import check_model, check_resumable, check_trainer, check_writable, warn_of_untrained
from ldm.cli_trainer import trainer_options
from ldm.config import check_config, from_dotlist, merge, without_checkpoints
from ldm.util import UserError, instantiate_from_config

log = logging.getLogger(__name__)

# Advice of the libraries' that does not hold here.
QUIET = (
    ".*does not have many workers.*",  # batches come whole from a memory map
    ".*LeafSpec.*",  # a notice of PyTorch's to Lightning's developers
    r".*module\(s\) in eval mode at the start of training.*",  # the first stage is frozen
    ".*could not find the monitored key.*",  # in an epoch that was over at the stop; else it was checked before
    ".*exists and is not empty.*",  # a resumed run's checkpoints
    ".*It is recommended to use .*sync_dist=True.*",  # training's losses are the first process's
    r".*torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # Lightning's own call
    ".*The dirpath has changed from.*",  # --resume_from_checkpoint goes on in a new directory
)


def _advertising(record: logging.LogRecord) -> bool:
    """A filter that keeps Lightning's advertisements out of the log."""
    return "For seamless cloud" not in record.getMessage()


def _follows() -> bool:
    """Whether this is another process than the first of a run on several devices."""
    return (getattr(rank_zero_only, "rank", None) or 0) > 0


def run_training(argv: Sequence[str], score: bool) -> int:
    """Parse, check, build, train.

    Returns:
        The exit status, 0.
    """
    opt, dotlist = parse(argv)
    run = locate_run(opt)
    config = merge([*run.bases, from_dotlist(dotlist)])
    set_token_num(config, opt.token_num)
    check_config(config)
    apply_flags(opt, config)
    options = trainer_options(config.lightning)
    nodes = lightning_nodes(config, run, score and not options.get("fast_dev_run"))
    check_writable(run.logdir)
    seed = config.lightning.seed
    pl.seed_everything(seed, workers=True, verbose=False)

    callbacks = build_callbacks(config, nodes, run, seed)
    log.info("building the model")
    model = instantiate_from_config(without_checkpoints(config.model) if run.checkpoint else config.model, "model")
    if not isinstance(model, pl.LightningModule):
        raise UserError(f"model.target: {config.model.target} is no LightningModule, so it cannot be trained")
    log.info("reading the data")
    data = instantiate_from_config(config.data, "data")
    if not isinstance(data, pl.LightningDataModule):
        raise UserError(f"data.target: {config.data.target} is no LightningDataModule")
    data.prepare_data()
    data.setup("fit")
    datasets = getattr(data, "datasets", {})
    if opt.train and datasets and "train" not in datasets:
        raise UserError("data.params.train is missing: there is nothing to train on")
    for callback in callbacks:
        if hasattr(callback, "check"):
            callback.check(model, datasets, options)
    check_model(model, datasets, OmegaConf.select(nodes, "modelcheckpoint.params.monitor"), callbacks)
    if run.checkpoint is not None:
        check_resumable(run.checkpoint, model, "--resume_from_checkpoint" if run.fresh else "-r")
    elif opt.train:
        warn_of_untrained(config)

    accumulate = options.get("accumulate_grad_batches") or 1
    configure_manual_optimization(model, options)
    trainer = build_trainer(options, callbacks, nodes, run)
    check_trainer(options, model, config.data, datasets, trainer.world_size)
    set_learning_rate(model, config, accumulate, trainer.world_size, config.lightning.scale_lr)
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    if opt.train:
        log.info("logging to %s", run.logdir)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    else:
        log.info("built everything; add -t to train")
    if "test" in datasets and not opt.no_test:
        for name, value in trainer.test(
            model, data, ckpt_path=None if opt.train else checkpoint, weights_only=True, verbose=False
        )[0].items():
            log.info("%s %.5g", name, value)
    return 0


def build_trainer(options: dict[str, Any], callbacks: list[pl.Callback], nodes: DictConfig, run: Run) -> pl.Trainer:
    """Lightning's Trainer, without the callbacks that its options exclude.

    Raises:
        UserError: options that the Trainer refuses.
    """
    options = dict(options)
    logger = options.pop("logger", None)
    if logger is None or logger is True:
        logger = instantiate_from_config(nodes.logger, "lightning.logger")
    excluded: tuple[type, ...] = ()
    if options.get("enable_checkpointing") is False:
        excluded += (Checkpoint,)
    if options.get("enable_progress_bar") is False:
        excluded += (ProgressBar,)
    if logger is False:
        excluded += (LearningRateMonitor,)
    callbacks = [callback for callback in callbacks if not isinstance(callback, excluded)]
    defaults = {"default_root_dir": str(run.logdir), "use_distributed_sampler": False}
    try:
        return pl.Trainer(**{**defaults, **options}, callbacks=callbacks, logger=logger)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error


def main(argv: Sequence[str] | None = None, score: bool = False) -> int:
    """Entry point of `main.py` and, with `score`, of `main_val.py`.

    Returns:
        The exit status: 0, 2 after a mistake of the user's, 130 after an interruption.
    """
    # The other processes of a run on several devices say what the first one says.
    level = logging.ERROR if _follows() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_advertising)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    argv = sys.argv[1:] if argv is None else argv
    debug = "-d" in argv or "--debug" in argv
    try:
        return run_training(argv, score)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except Interrupted as stop:
        if _follows():
            pass
        elif stop.checkpoint is None:
            sys.stderr.write("stopped before the first step: nothing to save\n")
        else:
            sys.stderr.write(f"stopped; saved {stop.checkpoint}. Go on with -r {stop.checkpoint.parent.parent}\n")
        return 130
    except KeyboardInterrupt:
        sys.stderr.write("stopped before training started\n")
        return 130
    except (MisconfigurationException, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except Exception:
        if debug:
            import pdb

            pdb.post_mortem()
        raise
