"""Imports go one way: each room of the package may import only what DESIGN says, also inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "ldm").rglob("*.py"))
# Room -> the rooms that it may import of ldm.
BASE = {"util", "factors", "lr_scheduler"}
ROOMS: dict[str, set[str]] = {
    "util": set(),
    "factors": set(),
    "lr_scheduler": set(),
    "data": {"util", "factors", "data"},
    "modules": {"util", "modules"},
    "metrics": {"factors", "metrics"},
    "models": {"util", "lr_scheduler", "modules", "models"},
    "variants": {"util", "modules", "models", "variants"},
    "callbacks": {"util", "factors", "data", "metrics", "models", "callbacks"},
    "cli": {*BASE, "data", "modules", "metrics", "models", "variants", "callbacks", "cli"},
}

# All of `ldm/__init__.py`.
LAZY_LOAD = """\
def __getattr__(name: str):
    # Resolved on first use, so that `import ldm.metrics` does not import torch.
    if name == "load":
        from ldm.api import load

        return load
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
"""


def room_of(module: str) -> str:
    """The room of a dotted module name: `ldm.data.dis` -> data; the command line's files are one room."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return "cli" if name in ("config", "api", "reconstruction", "fid") or name.split("_")[0] == "cli" else name


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever the statement stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from ldm import util` names the module after the import.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module in ("ldm", "") else {module}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def violations(path: Path) -> list[str]:
    room = room_of(module_of(path))
    ours = [name for name in imports(path) if name.split(".")[0] == "ldm"]
    return [name for name in ours if room_of(name) not in ROOMS[room]]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_import_what_the_table_allows(path):
    if path.name == "__init__.py":
        expected = LAZY_LOAD if path.parent == ROOT / "ldm" else ""
        assert path.read_text() == expected, "__init__ files are empty, but for the lazy ldm.load"
        return
    assert room_of(module_of(path)) in ROOMS, "a file in no room: extend the table of DESIGN first"
    assert violations(path) == []


def test_the_test_sees_hidden_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "ldm" / "metrics" / "hidden.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ldm.models.autoencoder\n"
        "def f():\n    from ldm import util\n    from ..callbacks import images\n    from ldm.factors import x\n"
    )
    assert sorted(violations(path)) == ["ldm.callbacks", "ldm.models.autoencoder", "ldm.util"]


def test_nothing_imports_the_scripts():
    scripts = {"main", "main_val", "scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & scripts, path


def test_load_is_found_lazily():
    import ldm
    from ldm.api import load

    assert ldm.load is load
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = ldm.laod


def test_metrics_need_no_torch():
    code = "import sys, ldm.metrics.evaluate; print({'torch', 'pytorch_lightning', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
    for path in (ROOT / "ldm" / "metrics").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "pytorch_lightning"}, path


def test_modules_know_neither_lightning_nor_data():
    for path in (ROOT / "ldm" / "modules").rglob("*.py"):
        assert "pytorch_lightning" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_print_and_no_fixed_device(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            assert not (isinstance(function, ast.Name) and function.id == "print"), f"line {node.lineno}: use logging"
            assert not (isinstance(function, ast.Attribute) and function.attr == "cuda"), f"line {node.lineno}: .cuda("
