"""Damage copies of a checkpoint in many ways, and try to resume from them and to load them.

    python scripts/soak_checkpoints.py --inputs 200 --seed 0

Each try ends in the right answer, or in one line that names the file. A traceback, a hang, or a model that differs
from the one that was saved is a fault, which the table counts and lists.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent))

from convert_checkpoint import convert

import ldm
from ldm.cli.main import main as command_line
from ldm.data.rendered import write_shapes3d
from ldm.util import UserError

RIGHT, ERROR, TRACEBACK, HANG, CHANGED = "right answer", "one clear error", "traceback", "hang", "silent change"
FAULTS = (TRACEBACK, HANG, CHANGED)
SIZES = (2, 2, 2, 2, 2, 2)


class Slow(Exception):
    """The time limit of a try."""


@dataclass
class Originals:
    """A trained first stage whose copies are damaged.

    Attributes:
        logdir: with `checkpoints/last.ckpt`, and an older checkpoint beside it. export: the safetensors file.
        content: of `last.ckpt`.
    """

    logdir: Path
    export: Path
    content: dict[str, Any]


def train(folder: Path) -> Originals:
    """Train a tiny first stage for two epochs, and export it."""
    write_shapes3d(folder / "shapes3d" / "3dshapes.h5", SIZES, 16)
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(folder)}}
    widths = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "out_ch": 3, "in_channels": 3}
    stage = {"z_channels": 3, "resolution": 16, "double_z": False, **widths}
    loss = {"disc_start": 2, "disc_num_layers": 1, "disc_ndf": 4, "perceptual_weight": 0.0}
    losses = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": loss}
    schedule = {"warm_up_steps": [5], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
    params = {"embed_dim": 3, "n_embed": 16, "ddconfig": stage, "lossconfig": losses, "monitor": "train/epoch_num"}
    params["scheduler_config"] = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    data = {"target": "ldm.data.module.DataModuleFromConfig", "params": {"batch_size": 32, "train": node}}
    config = {
        "model": {"base_learning_rate": 1e-5, "target": "ldm.models.autoencoder.VQModel", "params": params},
        "data": data,
        "lightning": {"callbacks": {"image_logger": {"params": {"disabled": True}}}},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "vq.yaml")
    argv = ["--base", str(folder / "vq.yaml"), "-t", "--gpus", "0", "--max_epochs", "2", "-l", str(folder / "logs")]
    if command_line([*argv, "--enable_progress_bar", "false"]):
        raise RuntimeError("the first stage could not be trained")
    (logdir,) = (folder / "logs").iterdir()
    export = folder / "model.safetensors"
    convert(logdir, export, None, False, False)
    return Originals(logdir, export, torch.load(logdir / "checkpoints" / "last.ckpt", weights_only=True))


# ---- damage


def flip(data: bytearray, draw: np.random.Generator) -> None:
    """Flip one to three bits anywhere."""
    for _ in range(draw.integers(1, 4)):
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))


def flip_near_an_end(data: bytearray, draw: np.random.Generator) -> None:
    """Flip a bit where the names and sizes of an archive's records are."""
    data[-1 - int(draw.integers(8000)) if draw.random() < 0.5 else int(draw.integers(4000))] ^= 1 << int(
        draw.integers(8)
    )


def truncate(data: bytearray, draw: np.random.Generator) -> None:
    """Cut anywhere, often near an end."""
    where = (draw.integers(len(data)), draw.integers(200), len(data) - 1 - draw.integers(200))
    del data[int(draw.choice(where)) :]


def zero(data: bytearray, draw: np.random.Generator) -> None:
    """Zero a block of a disk."""
    size = int(draw.choice((512, 4096, 65536)))
    start = int(draw.integers(max(len(data) // size, 1))) * size
    end = min(start + size, len(data))
    data[start:end] = bytes(end - start)


def swap(data: bytearray, draw: np.random.Generator) -> None:
    """Swap two blocks of a disk."""
    a, b = (int(k) * 512 for k in draw.choice(len(data) // 512, 2, replace=False))
    data[a : a + 512], data[b : b + 512] = data[b : b + 512], data[a : a + 512]


def swap_records(data: bytearray, draw: np.random.Generator) -> None:
    """Swap the bytes of two records of the same size in a zip archive; elsewhere, of two blocks."""
    if not data.startswith(b"PK"):
        return swap(data, draw)
    places: dict[int, list[int]] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            lengths = data[entry.header_offset + 26 : entry.header_offset + 30]
            start = entry.header_offset + 30 + sum(int.from_bytes(lengths[k : k + 2], "little") for k in (0, 2))
            places.setdefault(entry.file_size, []).append(start)
    size = int(draw.choice([size for size, starts in places.items() if len(starts) > 1 and size > 8]))
    a, b = (int(k) for k in draw.choice(places[size], 2, replace=False))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return None


def empty(data: bytearray, draw: np.random.Generator) -> None:
    """Nothing is left."""
    data.clear()


BYTES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    flip, flip, flip_near_an_end, truncate, zero, swap, swap_records, empty
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists are."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def other_values(value: Any) -> list[Any]:
    """Values that have no place where this one was."""
    wrong: list[Any] = [None, "abc", [], {}, -1, float("nan"), torch.ones(2, 3, 5)]
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
        wrong += [value * float("nan"), value.half(), value.reshape(-1)[:-1], value.to_sparse(), value.long()]
    return wrong


def replaced(content: dict[str, Any], draw: np.random.Generator) -> tuple[dict[str, Any], str]:
    """A copy of a checkpoint with one value that is another or missing, and which."""
    copy = torch.load(io.BytesIO(pickled(content)), weights_only=True)
    top = [path for path in places(copy) if len(path) == 1]
    sections = [key for (key,) in top]
    section = sections[int(draw.integers(len(sections)))]
    found = [path for path in places(copy) if path[0] == section]
    path = found[int(draw.integers(len(found)))]
    node = copy
    for key in path[:-1]:
        node = node[key]
    if draw.random() < 0.25 and isinstance(node, dict):
        del node[path[-1]]
        return copy, f"{path} is missing"
    choices = other_values(node[path[-1]])
    node[path[-1]] = choices[int(draw.integers(len(choices)))]
    return copy, f"{path} is {str(node[path[-1]])[:30]!r}"


def pickled(content: Any) -> bytes:
    """As `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def damage(target: Path, originals: Originals, draw: np.random.Generator, kinds: float = 0.25) -> str:
    """Damage a file in place, and say how; `kinds`: the share of replaced values in checkpoints."""
    if draw.random() < 0.03:
        target.unlink()
        target.mkdir()
        return "a folder in its place"
    if target.suffix == ".ckpt" and draw.random() < kinds:
        content, what = replaced(originals.content, draw)
        target.write_bytes(pickled(content))
        return what
    how = BYTES[int(draw.integers(len(BYTES)))]
    data = bytearray(target.read_bytes())
    how(data, draw)
    target.write_bytes(data)
    return how.__name__


# ---- tries


def differs(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether a weight is another one."""
    return any(not torch.equal(value, expected[name]) for name, value in found.items())


def try_to_load(path: Path, target: Path, originals: Originals) -> tuple[str, str]:
    """Load a model; gives what came of it, and the message."""
    try:
        model = ldm.load(path)
    except UserError as error:
        return (ERROR if target.name in str(error) or str(path) in str(error) else TRACEBACK), str(error)
    return (CHANGED if differs(model.state_dict(), originals.content["state_dict"]) else RIGHT), ""


def try_to_resume(path: Path, target: Path, originals: Originals) -> tuple[str, str]:
    """Resume up to where training would start; gives what came of it, and what the command line says."""
    resumed: list[str] = []
    start = lambda self, *args, ckpt_path, **kwargs: resumed.append(ckpt_path)  # noqa: E731
    err = io.StringIO()
    with mock.patch.object(pl.Trainer, "fit", start), contextlib.redirect_stderr(err):
        status = command_line(["-r", str(path), "-t"])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    if status:
        clear = len(errors) == 1 and len(errors[0]) < 2000 and target.name in errors[0]
        return (ERROR if clear else TRACEBACK), err.getvalue()
    (chosen,) = resumed
    if Path(chosen).name != target.name:
        return RIGHT, f"resumed from {chosen}"
    content = torch.load(chosen, weights_only=True)
    return (RIGHT if same(restored(content), restored(originals.content)) else CHANGED), ""


def restored(content: dict[str, Any]) -> list[Any]:
    """The parts of a checkpoint on which training depends; PyTorch and Lightning fill in others, or only write them."""
    groups = [group for optimizer in content["optimizer_states"] for group in optimizer["param_groups"]]
    settings = [[group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")] for group in groups]
    switched = [[bool(group.get(key)) for key in ("amsgrad", "maximize", "differentiable")] for group in groups]
    moments = [optimizer["state"] for optimizer in content["optimizer_states"]]
    schedules = [[state[key] for key in ("last_epoch", "base_lrs", "lr_lambdas")] for state in content["lr_schedulers"]]
    counters = {key: value for key, value in content["loops"]["fit_loop"].items() if "progress" in key}
    return [content["state_dict"], content["global_step"], counters, settings, switched, moments, schedules]


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return both and a.layout == b.layout and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def attempt(number: int, folder: Path, originals: Originals, seed: int, limit: int) -> dict[str, str]:
    """Damage a copy, try it, and tell what came of it; a function of (seed, number)."""
    draw = np.random.default_rng([seed, number])
    shutil.rmtree(folder, ignore_errors=True)
    logdir = Path(shutil.copytree(originals.logdir, folder / "run"))
    last, export = logdir / "checkpoints" / "last.ckpt", folder / "model.safetensors"
    shutil.copy(originals.export, export)
    shutil.copy(originals.export.with_suffix(".yaml"), folder / "model.yaml")
    tries: list[tuple[str, Callable[..., tuple[str, str]], Path, Path]] = [
        ("-r LOGDIR", try_to_resume, logdir, last),
        ("-r CKPT", try_to_resume, last, last),
        ("load ckpt", try_to_load, logdir, last),
        ("load safetensors", try_to_load, export, export),
    ]
    name, function, path, target = tries[number % len(tries)]
    how = damage(target, originals, draw)
    before = sorted(str(file) for file in folder.rglob("*"))
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(limit)
    try:
        outcome, message = function(path, target, originals)
    except Slow:
        outcome, message = HANG, f"more than {limit} s"
    except Exception:
        outcome, message = TRACEBACK, traceback.format_exc()
    finally:
        signal.alarm(0)
    if outcome == ERROR and sorted(str(file) for file in folder.rglob("*")) != before:
        outcome, message = TRACEBACK, f"it wrote files before its error: {message}"
    return {"number": str(number), "try": name, "damage": how, "outcome": outcome, "message": message.strip()}


def _too_slow(signum: int, frame: Any) -> None:
    raise Slow


def soak(inputs: int, seed: int, folder: Path, limit: int = 120) -> list[dict[str, str]]:
    """Try as many damaged files.

    Args:
        inputs: their number.
        seed: of the damage.
        folder: to work in.
        limit: seconds for one try.

    Returns:
        For each, what was damaged and tried, and what came of it.
    """
    originals = train(folder)
    return [attempt(number, folder / "copy", originals, seed, limit) for number in range(inputs)]


def main(argv: list[str] | None = None) -> int:
    """Print counts and faults; gives the exit status: 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200, help="number of damaged files (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--json", type=Path, help="write every try to this file")
    opt = parser.parse_args(argv)
    for name in (None, "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        found = soak(opt.inputs, opt.seed, Path(folder))
    if opt.json:
        opt.json.write_text(json.dumps(found, indent=1))
    counts = Counter((entry["try"], entry["outcome"]) for entry in found)
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:<18}{outcome:<18}{count}")
    faults = [entry for entry in found if entry["outcome"] in FAULTS]
    for entry in faults:
        print("", *(f"{key}: {value}" for key, value in entry.items()), sep=os.linesep)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
