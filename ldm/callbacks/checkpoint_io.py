"""Checkpoints appear under their names whole, or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.util import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits for the disk, and renames it.

    Lightning writes into the system's folder for temporary files and moves the file from there: a copy, if that lies on
    another file system, which an interruption cuts off under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, over an older file of the same name.

        Raises:
            UserError: the disk is full, or the folder cannot be written to; the older file is as it was.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed; one run writes here
                left.unlink(missing_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # PyTorch's writer reports a full disk as RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or "the disk may be full"
            raise UserError(
                f"cannot write the checkpoint '{path}' ({reason}): what was there before is intact; make room, and"
                f" resume with -r {path.parent.parent}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk knows the new name, where the system can."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
