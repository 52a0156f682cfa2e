"""Imports go one way: each room of the package imports only the rooms in the table, also inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "ldm").rglob("*.py"))
USES = {"util", "factors", "bars", "pictures", "data", "metrics", "modules", "models"}
# Room -> the rooms of ldm that it may import, besides itself.
ROOMS: dict[str, set[str]] = {
    "util": {"targets", "signatures"},
    "targets": set(),
    "factors": set(),
    "pictures": {"util"},
    "lr_scheduler": set(),
    "optimizers": {"util"},
    "signatures": set(),
    "signals": set(),
    "bars": set(),
    "config": {"util", "signatures", "targets"},
    "hub": {"util"},
    "compat": {"util"},
    "data": {"util", "factors", "pictures", "bars"},
    "modules": {"util"},
    "metrics": {"factors"},
    "models": {"util", "pictures", "signals", "bars", "lr_scheduler", "optimizers", "modules", "compat"},
    "variants": {"util", "modules", "models"},
    "evaluation": USES,
    "figures": {*USES, "evaluation", "config"},  # the report compares configurations
    "callbacks": {*USES, "signals", "targets", "evaluation", "figures"},
}
ROOMS["cli"] = ROOMS["api"] = {*ROOMS, "cli", "api"}

# All of `ldm/__init__.py`.
LAZY_LOAD = """\
def __getattr__(name: str):
    # Resolved on first use, so that `import ldm.metrics` does not import torch.
    if name in ("load", "match", "score"):
        from ldm import api

        return getattr(api, name)
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
"""


def room_of(module: str) -> str:
    """The room of a dotted module name: `ldm.data.dis` -> data."""
    return [*module.split("."), ""][1]


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
    return [f"{path}: {name}" for name in ours if room_of(name) not in {*ROOMS[room], room}]


def test_rooms_import_what_the_table_allows():
    found = []
    for path in FILES:
        if path.name == "__init__.py":
            expected = LAZY_LOAD if path.parent == ROOT / "ldm" else ""
            assert path.read_text() == expected, "__init__ files are empty, but for the lazy ldm.load"
        else:
            assert room_of(module_of(path)) in ROOMS, f"{path} is in no room: extend the table first"
            found += violations(path)
    assert found == []


def test_the_test_sees_hidden_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "ldm" / "metrics" / "hidden.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ldm.models.autoencoder\n"
        "def f():\n    from ldm import util\n    from ..callbacks import images\n    from ldm.factors import x\n"
    )
    found = sorted(line.split(": ")[1] for line in violations(path))
    assert found == ["ldm.callbacks", "ldm.models.autoencoder", "ldm.util"]


def test_nothing_imports_the_scripts():
    scripts = {"main", "main_val", "scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & scripts, path


def test_the_api_is_found_lazily():
    import ldm
    from ldm import api

    assert (ldm.load, ldm.match, ldm.score) == (api.load, api.match, api.score)
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


def test_no_print_and_no_fixed_device():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None), getattr(node.func, "attr", None)
                assert name != ("print", None) and name[1] != "cuda", f"{path}:{node.lineno}"
