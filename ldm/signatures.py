"""What a class's constructor takes, read from its source: nothing is imported.

Importing PyTorch and Lightning takes seconds. A mistake in a configuration, or `--help`, should not wait for them.
"""

import ast
import functools
import importlib.machinery
import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Union, get_type_hints

# Types by their names in annotations, as far as values are checked against them; all others are Any.
TYPES = {"int": int, "float": float, "bool": bool, "str": str}
LISTS = {"list": list, "List": list, "Sequence": Sequence, "Iterable": Iterable, "Mapping": Mapping}
KINDS = inspect.Parameter


def parameters_of(function: Any) -> tuple[dict[str, Any], bool]:
    """Type hints of its parameters, those of bases that get `**kwargs` included, and whether it takes others too."""
    found: dict[str, Any] = {}
    owners = [vars(cls)["__init__"] for cls in getattr(function, "__mro__", ()) if "__init__" in vars(cls)]
    for owner in owners or [function]:
        parameters, hints = inspect.signature(owner).parameters.values(), getattr(owner, "__annotations__", {})
        with suppress(NameError, TypeError):  # names that only type checkers import
            hints = get_type_hints(owner)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, True


@functools.cache
def stand_in(target: str) -> Any:
    """A class or function with the signature, the name and, as stand-ins too, the bases of the one that is named.

    Args:
        target: dotted name, such as `ldm.models.autoencoder.VQModel`.

    Returns:
        What `inspect.signature`, `typing.get_type_hints` and `issubclass` can be asked about; None where the source
        does not show it, as for a compiled class, or one that is made by a call.
    """
    module, _, name = target.rpartition(".")
    path = _source(module)
    tree = None if path is None else _tree(path)
    if path is None or tree is None:
        return None
    for node in reversed(tree.body):  # the last definition counts
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return None if node.decorator_list else _function(node, module)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _class(node, tree, module, path)
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            other = getattr(node.value, "id", name)  # of `B = A`
            return stand_in(f"{module}.{other}") if other != name else None
    imported = _imported(tree, module, path).get(name)
    return stand_in(imported) if imported not in (None, target) else None


def _source(module: str) -> Path | None:
    """The file of a module, found as Python would, but without importing the packages around it."""
    names = module.split(".")
    try:
        spec = importlib.util.find_spec(names[0]) if names[0] else None
        for end in range(2, len(names) + 1):
            if spec is None:
                return None
            places = spec.submodule_search_locations
            spec = importlib.machinery.PathFinder.find_spec(".".join(names[:end]), places)
    except (ImportError, ValueError):
        return None
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


@functools.cache
def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _imported(tree: ast.Module, module: str, path: Path) -> dict[str, str]:
    """Names that a module imports by `from … import …`, and where from."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return found


class Unknown:
    """The base of a class whose bases' source is not at hand: takes anything."""

    def __init__(self, **kwargs: Any) -> None: ...


def _class(node: ast.ClassDef, tree: ast.Module, module: str, path: Path) -> type:
    imported, bases = _imported(tree, module, path), []
    for base in node.bases:
        target = imported.get(base.id, f"{module}.{base.id}") if isinstance(base, ast.Name) else None
        found = stand_in(target) if target not in (None, f"{module}.{node.name}") else None
        bases.append(found if inspect.isclass(found) else Unknown)
    members: dict[str, Any] = {"__module__": module}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            members["__init__"] = _function(item, module)
    if not node.bases and "__init__" not in members:
        bases = [Unknown]  # a dataclass, say
    try:
        return type(node.name, tuple(dict.fromkeys(bases)), members)
    except TypeError:  # an order of bases that the stand-ins do not allow
        return type(node.name, (Unknown,), members)


def _function(node: ast.FunctionDef, module: str) -> Any:
    """A function with the signature of a definition; its defaults are None, whatever they are."""

    def function(*args: Any, **kwargs: Any) -> None: ...

    given = node.args
    parameters: list[tuple[ast.arg, Any, bool]] = []
    positional = [*given.posonlyargs, *given.args]
    without = len(positional) - len(given.defaults)
    for place, argument in enumerate(positional):
        kind = KINDS.POSITIONAL_ONLY if place < len(given.posonlyargs) else KINDS.POSITIONAL_OR_KEYWORD
        parameters.append((argument, kind, place >= without))
    parameters += [(given.vararg, KINDS.VAR_POSITIONAL, False)] if given.vararg else []
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append((argument, KINDS.KEYWORD_ONLY, default is not None))
    parameters += [(given.kwarg, KINDS.VAR_KEYWORD, False)] if given.kwarg else []
    signature = inspect.Signature(
        [inspect.Parameter(a.arg, kind, default=None if has else KINDS.empty) for a, kind, has in parameters]
    )
    hints = {a.arg: _hint(a.annotation) for a, _, _ in parameters if a.annotation is not None}
    function.__name__, function.__module__ = node.name, module
    function.__annotations__, function.__signature__ = hints, signature  # type: ignore[attr-defined]
    return function


def _hint(node: ast.expr) -> Any:
    """The type that an annotation names, Any where it names something else than numbers, texts and lists."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _hint(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp):
        return Union[_hint(node.left), _hint(node.right)]  # noqa: UP007 - of values
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "Optional":
            return Union[_hint(node.slice), None]  # noqa: UP007
        if node.value.id == "Union" and isinstance(node.slice, ast.Tuple):
            return Union[tuple(map(_hint, node.slice.elts))]  # noqa: UP007
        kind: Any = LISTS.get(node.value.id)
        return Any if kind is None else kind[Any, Any] if kind is Mapping else kind[Any]
    return TYPES.get(node.id, Any) if isinstance(node, ast.Name) else Any
