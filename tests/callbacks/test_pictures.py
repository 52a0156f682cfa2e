"""Pictures arrive at the loggers that take them."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks.pictures import send_picture

PIXELS = np.zeros((4, 6, 3), np.uint8)
PIXELS[0, 5] = 10, 200, 30


class WandB:
    """As Lightning's WandbLogger, whose run takes no pictures by itself."""

    experiment = SimpleNamespace(log=None)

    def __init__(self):
        self.sent = []

    def log_image(self, key, images, step=None, **options):
        self.sent.append((key, images, step, options))


class Client:
    """As MLflow's client."""

    def __init__(self):
        self.sent = []

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=None):
        self.sent.append((run_id, image, artifact_file, key, step))


def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    send_picture([CSVLogger(str(tmp_path)), logger], "figures/swaps", PIXELS, 7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Images("figures/swaps")
    assert event.step == 7
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), PIXELS)


def test_others():
    wandb, mlflow = WandB(), SimpleNamespace(experiment=Client(), run_id="abc")
    send_picture([wandb, mlflow], "train/samples", PIXELS, 7)
    ((key, images, step, options),) = wandb.sent
    assert (key, step, options) == ("train/samples", 7, {}) and isinstance(images, list) and images[0] is PIXELS
    assert mlflow.experiment.sent == [("abc", PIXELS, None, "train/samples", 7)]
