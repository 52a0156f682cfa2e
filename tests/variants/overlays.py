"""The files of configs/ablations, and configurations that use them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

from command_line import CHECKPOINT, ROOT, encdiff_config
from omegaconf import DictConfig, OmegaConf

from ldm.cli.configure import compose
from ldm.config import load_yaml

ABLATIONS = ROOT / "configs" / "ablations"
NAMES = sorted(path.stem for path in ABLATIONS.glob("*.yaml"))
BASES = [*sorted((ROOT / "configs" / "latent-diffusion").glob("*.yaml")), ROOT / "configs" / "quickstart/encdiff.yaml"]
SHAPES3D = ROOT / "configs" / "latent-diffusion" / "shapes3d-vq-4-16.yaml"


def composed(bases: Sequence[Path], *names: str) -> DictConfig:
    """Configurations and overlays, merged and checked as the command line does it.

    Raises:
        UserError: they do not go together, or the result is invalid.
    """
    return compose([*bases, *(ABLATIONS / f"{name}.yaml" for name in names)], complete=False)


read_once = cache(load_yaml)


@contextmanager
def each_file_read_once() -> Iterator[None]:
    """Inside the block a YAML file is parsed once, which is most of the time that merging takes."""
    with patch("ldm.config.load_yaml", read_once):
        yield


def tiny_encdiff(folder: Path) -> list[Path]:
    """The tiny EncDiff of the tests, without a first stage's checkpoint."""
    config = OmegaConf.create(encdiff_config(folder))
    OmegaConf.update(config, CHECKPOINT, None)
    path = folder / "enc.yaml"
    OmegaConf.save(config, path)
    return [path]


def without_checkpoint(folder: Path, base: Path = SHAPES3D) -> list[Path]:
    """A shipped configuration, and a file that leaves the first stage's checkpoint out."""
    path = folder / "no_checkpoint.yaml"
    node = OmegaConf.create()
    OmegaConf.update(node, CHECKPOINT, None)
    OmegaConf.save(node, path)
    return [base, path]
