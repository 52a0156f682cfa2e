"""Pictures to loggers, and the data set whose images are shown."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl


def send_picture(loggers: Iterable[Any], name: str, pixels: np.ndarray, step: int) -> None:
    """Send a picture to those loggers that take pictures: TensorBoard's, W&B's and MLflow's.

    Args:
        loggers: of Lightning. Another one is left out.
        name: of the picture, such as `train/samples`.
        pixels: (height, width, 3) uint8.
        step: of training.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_image"):
            experiment.add_image(name, pixels, global_step=step, dataformats="HWC")
        elif hasattr(logger, "log_image"):  # W&B's, which counts steps in a value of its own
            logger.log_image(key=name, images=[pixels], step=step)
        elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow's client
            experiment.log_image(logger.run_id, pixels, key=name, step=step)


def shown_dataset(trainer: pl.Trainer) -> Any:
    """The data set whose images are shown: for validation, or for training if there is none."""
    datasets = getattr(trainer.datamodule, "datasets", {})  # type: ignore[attr-defined]
    dataset = datasets.get("validation") or datasets.get("train")
    if dataset is None:
        loader = trainer.val_dataloaders or trainer.train_dataloader
        dataset = loader.dataset  # type: ignore[union-attr]
    return dataset
