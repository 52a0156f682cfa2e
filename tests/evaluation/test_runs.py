"""Records of runs, by step."""

import os
from pathlib import Path

import pytest

from ldm.evaluation.runs import figures_of, record_at
from ldm.util import UserError


def test_records_in_the_order_of_their_steps(tmp_path):
    assert record_at(tmp_path) == {}
    (tmp_path / "metrics").mkdir()
    for step in (500, 999999, 1000000):
        (tmp_path / "metrics" / f"{step:06}.json").write_text(f'{{"step": {step}}}')
    (tmp_path / "metrics" / "notes.json").write_text("{}")
    assert [record_at(tmp_path, step).get("step") for step in (None, 1000000, 999999, 600, 3)] == [
        *(1000000, 1000000, 999999, 500),
        500,
    ]
    (tmp_path / "metrics" / "1000000.json").write_text("{")
    assert record_at(tmp_path) == {}
    with pytest.raises(UserError, match="is damaged: move it away"):
        record_at(tmp_path, strict=True)


def drawn(folder: Path, time: int, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, (time, time))


def test_of_each_figure_the_newest(tmp_path):
    """A few figures hide no others, and old ones no newer ones."""
    steps = tmp_path / "images" / "figures"
    assert figures_of(tmp_path) == {}
    drawn(steps / "999999", 5, "swaps.png", "attention.png", "matrices.png")
    drawn(steps / "1000000", 20, "swaps.png", "matrices.png", "notes.txt")
    drawn(tmp_path / "figures", 30, "matrices.png", "matrices.pdf", "traversals.png", "traversals.gif")
    drawn(tmp_path / "figures", 10, "swaps.png", "swaps.gif")
    found = {name: [str(path.relative_to(tmp_path)) for path in paths] for name, paths in figures_of(tmp_path).items()}
    assert found == {
        "attention": ["images/figures/999999/attention.png"],
        "matrices": ["figures/matrices.png"],
        "swaps": ["images/figures/1000000/swaps.png"],
        "traversals": ["figures/traversals.png", "figures/traversals.gif"],
    }
