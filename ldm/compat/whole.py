"""Whether the file of a checkpoint is whole, and which one of a folder is the newest: without PyTorch, whose import
takes seconds, and without running anything in the files."""

import hashlib
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What reading a damaged file may raise.
BROKEN = (ValueError, TypeError, RuntimeError, AssertionError, LookupError, ArithmeticError, OSError, AttributeError,
          ImportError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError,
          MemoryError)  # fmt: skip
# What a checkpoint that can be resumed from holds, at least.
TRAINING_STATE = {"state_dict", "loops", "optimizer_states", "global_step"}
# How a file begins that PyTorch wrote before version 1.6: a pickled number, of which this is the hexadecimal form.
MAGIC_NUMBER = "1950a86a20f9469cfc6c"
CHECKSUM = "sha256"  # its key in the metadata of our safetensors files


class Inert:
    """Takes the place of any class or function that a pickle names, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    # What pickles of dictionaries and lists do to them, where they are read in trust; PyTorch refuses them before.

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Drop an entry."""

    def extend(self, values: Any) -> None:
        """Drop entries."""


class _Dict(dict):
    """Takes the place of `OrderedDict`: a state dict has attributes too."""


class _Skimmer(pickle.Unpickler):
    """Reads plain values, and dictionaries and lists of them; tensors and all else become inert."""

    def find_class(self, module: str, name: str) -> Any:
        return _Dict if (module, name) == ("collections", "OrderedDict") else Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


def reason_of(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error) or repr(error)).splitlines()[0]


def is_checkpoint(path: Path) -> bool:
    """Whether a file starts as PyTorch's do: a zip archive, or before version 1.6 a pickled magic number."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return MAGIC_NUMBER in file.read(32)[::-1].hex()


def damage(path: Path) -> str | None:
    """What is wrong with the file of a checkpoint, as the end of a sentence; None if nothing is.

    Of a `.ckpt`, the CRC of every record is checked, in a third of a second for 600 MB; PyTorch itself does not. Files
    written before PyTorch 1.6, or by it without checksums, have none. Of a `.safetensors`, the checksum is ours: see
    `sealed`; files of others have none.

    Args:
        path: a file that exists.
    """
    try:
        if path.is_dir():
            return "is a folder"
        if path.suffix == ".safetensors":
            return _damage_of_safetensors(path)
        if not is_checkpoint(path):
            return "is not a checkpoint, or is truncated (it does not begin and end as one)"
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
        return f"is damaged: the checksum of its part {wrong!r} is wrong" if wrong else None
    except BROKEN as error:
        return f"is not a checkpoint, or is truncated ({reason_of(error)})"


def training_step(path: Path) -> int | None:
    """The global step at which a checkpoint was saved; None if it holds no state of a training run.

    Raises:
        one of BROKEN: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        content = _Skimmer(io.BytesIO(archive.read(name))).load()
    if not isinstance(content, dict) or not set(content) >= TRAINING_STATE:
        return None
    step = content["global_step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its global_step is {step!r}")
    return step


def newest_whole(folder: Path, but: Path | None = None) -> tuple[Path | None, int, dict[str, str]]:
    """The checkpoint of the highest global step in a folder whose file is whole; of equals, `last.ckpt`.

    Temporary files of an interrupted write, and checkpoints of weights alone, are passed over.

    Args:
        folder: the folder.
        but: a checkpoint to pass over.

    Returns:
        Its path, or None if there is none; its step; and, by name, what is wrong with those that may be newer, and
        with `last.ckpt`.
    """
    steps: dict[Path, int] = {}
    wrong: dict[str, str] = {}
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path.name != "last.ckpt", path.name)):
        if path.name.startswith(".") or path == but:
            continue
        try:
            step = training_step(path)
        except BROKEN as error:
            wrong[path.name] = damage(path) or f"cannot be read ({reason_of(error)})"
            continue
        if step is not None:
            steps[path] = step
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):  # stable: `last.ckpt` is first
        problem = damage(path)
        if problem is None:
            last = folder / "last.ckpt"
            if steps.get(last, steps[path]) < steps[path]:  # after resuming from one that is older still
                wrong[last.name] = f"is older (step {steps[last]})"
            return path, steps[path], wrong
        wrong[path.name] = problem
    return None, 0, wrong


def instead_of(path: Path) -> str:
    """The end of a message on a checkpoint that cannot be used: the newest whole one beside it, if there is one."""
    found, step, _ = newest_whole(path.parent, but=path)
    return f"; the newest whole one beside it is '{found}' (step {step})" if found else ""


def sealed(content: bytes) -> tuple[bytes, memoryview]:
    """The content of a safetensors file with a checksum of all of it in its metadata, in two pieces.

    The format has none. Header and tensors are covered: a changed name, type or shape is found as well.
    """
    start, header = _header(content[:8], content[8 : 8 + int.from_bytes(content[:8], "little")])
    payload = memoryview(content)[start:]
    digest = hashlib.sha256(_canonical(header))
    digest.update(payload)
    header["__metadata__"] = {**header.get("__metadata__", {}), CHECKSUM: digest.hexdigest()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text, payload


def _damage_of_safetensors(path: Path) -> str | None:
    with path.open("rb") as file:
        length = file.read(8)
        if int.from_bytes(length, "little") > path.stat().st_size:
            return "is not a safetensors file, or is truncated (its header is longer than the file)"
        _, header = _header(length, file.read(int.from_bytes(length, "little")))
        expected = header.get("__metadata__", {}).get(CHECKSUM)
        if expected is None:
            return None
        digest = hashlib.sha256(_canonical(header))
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    return None if found == expected else f"is damaged: the checksum in its metadata ({CHECKSUM}) is wrong"


def _header(length: bytes, text: bytes) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the header."""
    header = json.loads(text)
    if len(length) != 8 or not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is none")
    return 8 + len(text), header


def _canonical(header: Mapping[str, Any]) -> bytes:
    """The header without the checksum, in one form."""
    metadata = {key: value for key, value in header.get("__metadata__", {}).items() if key != CHECKSUM}
    return json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode()
