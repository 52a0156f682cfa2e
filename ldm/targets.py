"""Which classes a configuration may name, so that no YAML file can run what its reader does not trust.

`ldm.util.instantiate_from_config` asks here before it imports or calls anything.
"""

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

# Of taming only what builds nothing itself: its models call whatever their own nested configurations name.
PACKAGES = ("ldm", "torch", "pytorch_lightning", "taming.modules")
# What the places of a configuration want: the base that a class must have, or the methods.
KINDS: dict[str, str | tuple[str, ...]] = {
    "Lightning module": "pytorch_lightning.core.module.LightningModule",
    "data module": "pytorch_lightning.core.datamodule.LightningDataModule",
    "network": "torch.nn.modules.module.Module",
    "callback": "pytorch_lightning.callbacks.callback.Callback",
    "logger": "pytorch_lightning.loggers.logger.Logger",
    "data set": ("__len__", "__getitem__"),
    "scheduler": ("schedule",),
    "optimizer": "torch.optim.optimizer.Optimizer",
}


class _Trust(NamedTuple):
    modules: tuple[str, ...] = ()
    working_directory: bool = False
    outside: Path | None = None


_TRUST: ContextVar[_Trust] = ContextVar("_TRUST")


@contextmanager
def allowing(
    modules: str | Iterable[str] = (), working_directory: bool = False, outside: Path | None = None
) -> Iterator[None]:
    """Inside the block, targets are also taken from these modules and packages.

    Args:
        modules: dotted names, as of `--allow`.
        working_directory: also from every module and package that lies in the working directory,
        outside: but for those that lie in this folder, or hold it: it may be somebody else's.
    """
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    token = _TRUST.set(_Trust(modules, working_directory, outside and outside.resolve()))
    try:
        yield
    finally:
        _TRUST.reset(token)


def refusal(target: str, defined_in: str = "") -> str | None:
    """Why a class is not taken, in one line; None if it is. Nothing is imported.

    Args:
        target: dotted name.
        defined_in: the class's module, once it is known: that of the name may only have imported it.
    """
    module, trust = defined_in or target.rpartition(".")[0], _TRUST.get(_Trust())
    named, top = _within(module, trust.modules), module.partition(".")[0]
    if not named and _within(module, PACKAGES):
        private = not defined_in and any(part.startswith("_") for part in target.split("."))
        return f"'{target}' is private: expected a class that its package shows" if private else None
    if named or (trust.working_directory and _lies_here(top, trust.outside)):
        _join_path(top)
        return None
    if trust.working_directory and not _anywhere(top):
        close = difflib.get_close_matches(top, [path.stem for path in Path.cwd().glob("*.py")], n=1)
        return f"there is no module '{top}'" + (f"; did you mean '{close[0]}'?" if close else "")
    places = [*PACKAGES, *(["the working directory"] if trust.working_directory else [])]
    return (
        f"'{target}' is defined in '{module}', and classes are taken from {', '.join(places)} only: if you trust it,"
        f" give --allow {top}" + ("" if trust.working_directory else f" (in Python: allow=['{top}'])")
    )


def _anywhere(top: str) -> bool:
    """Whether there is a module or package of this name, here or where Python looks."""
    try:
        return bool(importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())]))
    except (ImportError, ValueError):  # `__main__`
        return True


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _lies_here(top: str, outside: Path | None) -> bool:
    """Whether a module or package lies in the working directory, and no other of its name comes before it.

    A folder without `__init__.py` is none: any that holds a YAML file, and what came with it, would be one.
    """
    found = PathFinder.find_spec(top, [str(Path.cwd())])
    if found is None or found.origin is None:
        return False
    place = Path(next(iter(found.submodule_search_locations or [found.origin]))).resolve()
    if outside is not None and (place.is_relative_to(outside) or outside.is_relative_to(place)):
        return False
    try:
        first = importlib.util.find_spec(top)
    except ValueError:  # `__main__`
        return False
    return first is None or Path(str(first.origin)).resolve() == Path(found.origin).resolve()


def _join_path(top: str) -> None:
    """Let Python find in the working directory what it finds nowhere else, as where a script lies in another folder."""
    if (
        top not in sys.modules
        and importlib.util.find_spec(top) is None
        and PathFinder.find_spec(top, [str(Path.cwd())])
    ):
        sys.path.append(str(Path.cwd()))


def suits(cls: type, kind: str | type) -> bool:
    """Whether a class is what a place wants: a kind of `KINDS`, a class of that type; "" for any of `KINDS`."""
    if isinstance(kind, type):
        return issubclass(cls, kind)
    if not kind:
        return any(suits(cls, known) for known in KINDS)
    wanted = KINDS[kind]
    if isinstance(wanted, tuple):
        return all(callable(getattr(cls, method, None)) for method in wanted)
    return wanted in {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}


def described(kind: str | type) -> str:
    """A kind in words: `a network (derived from torch.nn.modules.module.Module)`."""
    if isinstance(kind, type):
        return f"a {kind.__name__} (derived from {kind.__module__}.{kind.__qualname__})"
    if not kind:
        return f"a {', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]}"
    wanted = KINDS[kind]
    how = f"with {' and '.join(wanted)}" if isinstance(wanted, tuple) else f"derived from {wanted}"
    return f"{'an' if kind[0] in 'aeio' else 'a'} {kind} ({how})"
