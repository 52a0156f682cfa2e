"""Networks that others trained: where their weights come from."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ldm.util import UserError

T = TypeVar("T")


class Pretrained(NamedTuple):
    """The published weights of a network.

    Attributes:
        network: its name, for messages.
        url: where the file is published.
        remedy: what to do where it cannot be fetched, after "or".
    """

    network: str
    url: str
    remedy: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    def load(self, path: str | Path | None, build: Callable[[Path], T]) -> T:
        """Build the network from its file.

        Args:
            path: your own copy; if left out, the file in torch hub's folder, which is fetched at first use.
            build: makes the network from the file.

        Raises:
            UserError: the file cannot be fetched or used.
        """
        file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / self.file
        try:
            if path is None and not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(file))
            return build(file)
        except Exception as error:  # urllib, ssl, pickle, a missing name: whatever went wrong, the remedy is the same
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            raise UserError(
                f"cannot use {self.network}'s weights in '{file}' ({reason}): save {self.url} there, or {self.remedy}"
            ) from error
