"""README and docs: links lead somewhere, what is named exists, YAML is YAML."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from pytorch_lightning import Trainer

from ldm.cli.arguments import get_parser
from ldm.metrics.evaluate import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```$", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"\b((?:configs|ldm|scripts|docs)/[\w./-]*\w\.(?:py|sh|yaml|md|png))\b", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml(page):
    for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.M | re.S):
        assert isinstance(yaml.safe_load(block), dict)


def test_tree_of_the_readme():
    """Each line of the tree names a path, indented under its folder."""
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    found = 0
    for indent, names in re.findall(r"^( *)((?:[\w./]+(?:\.py|/) ?)(?: *[\w./]+\.py)?)(?= {2}|$)", tree, re.M):
        while folders[-1][0] >= len(indent):
            folders.pop()
        for name in names.split():
            path = folders[-1][1] / name
            assert path.exists(), path
            found += 1
        folders.append((len(indent), path))
    assert found > 15


def test_every_metric_is_documented():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert all(re.search(rf"^\|[^|]*`{name}`", page, re.M) for name in METRICS)


def test_flags():
    """Every flag of our own has a line in the table, and the flags named there exist."""
    actions = [action for action in get_parser()._actions if action.dest != "help"]
    table = (ROOT / "docs" / "training.md").read_text().split("## Flags")[1].split("\n## ")[0]
    named = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", table))
    assert all(named & set(action.option_strings) for action in actions)
    known = {option for action in actions for option in action.option_strings}
    assert named <= known | {f"--{name}" for name in inspect.signature(Trainer.__init__).parameters}
