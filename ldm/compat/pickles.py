"""Stand-ins for pickled objects, so that a checkpoint is read without running what it names."""

import _compat_pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


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


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Takes the place of `defaultdict`, which gets items after it was made."""
    return {}


class _DType(Inert):
    """Takes the place of NumPy's types: keeps the name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name


def _number(dtype: Any, data: Any) -> Any:
    """Takes the place of NumPy's scalars: the number in its bytes. LDM's schedules leave such learning rates."""
    known = isinstance(dtype, _DType) and isinstance(dtype.name, str) and re.fullmatch(r"[fiub][1-8]", dtype.name)
    if not known or not isinstance(data, bytes) or len(data) != np.dtype(dtype.name).itemsize:
        return Inert()
    return np.frombuffer(data, dtype=f"<{dtype.name}")[0].item()


# What can be told from the pickle alone.
DECODED: dict[str, Any] = {
    "collections.defaultdict": _plain_dict,
    "numpy.dtype": _DType,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
# What PyTorch reads itself.
TENSORS = re.compile(
    r"torch\.(_utils\._rebuild\w*|\w+Storage|Size|Tensor|device|nn\.parameter\.Parameter)|_codecs\.encode"
)


def named_objects(path: Path) -> set[str]:
    """Dotted names of the classes and functions in a file that tensors alone do not need; nothing is imported."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found = set()
    with path.open("rb") as file:
        for _ in range(4):  # before PyTorch 1.6: four pickles (magic number, protocol, system, content), then tensors
            for operation, argument, _position in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, name = str(argument).split(" ", 1)
                    # Names of Python 2, which pickles of protocol 2 use.
                    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
                    found.add(f"{module}.{name}")
    return {name for name in found if not TENSORS.fullmatch(name)}


def stand_ins(names: set[str]) -> list[Any]:
    """For each name what takes its place, as `torch.serialization.safe_globals` asks for it."""
    return [(DECODED.get(name, Inert), name) for name in sorted(names)]
