"""scripts/soak_files.py: a short round; and what it would say of readers that are worse."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import soak_files
from soak_formats import FORMATS


@pytest.mark.slow
def test_forty_damaged_files(tmp_path):
    rows = soak_files.soak(40, 3, tmp_path)
    assert len(rows) == 40 and {row["format"] for row in rows} == set(FORMATS)
    assert [row for row in rows if row["outcome"] in soak_files.BAD] == []
    assert {row["outcome"] for row in rows} >= {"error", "right"}


def test_what_is_damaged_depends_on_the_seed_alone(tmp_path):
    names = ["codes", "yaml", "npz packed"]
    for name in names:
        (tmp_path / "valid" / name / "files").mkdir(parents=True)
        target = FORMATS[name].write(tmp_path / "valid" / name / "files")
        (tmp_path / "valid" / name / "target").write_text(target.name)

    def damaged(seed: int, folder: str) -> list:
        found: list = []
        for number in range(30):
            where = tmp_path / folder / str(number)
            found.append(soak_files.damage(tmp_path / "valid", names, number, seed, where))
            found += [path.read_bytes() if path.is_file() else path.name for path in sorted(where.iterdir())]
        return found

    first = damaged(0, "a")
    assert damaged(0, "b") == first and damaged(1, "c") != first


def test_outcomes():
    read = {"kind": "read", "structure": "s", "values": "v"}
    for change, without, wanted in [
        ({}, "", "right"),
        ({"values": "w"}, "", "silent"),
        ({"values": "w"}, "values", "raw"),
        ({"structure": "t"}, "values", "silent"),
        ({"structure": "t"}, "text", "text"),
        ({"kind": "error"}, "", "error"),
    ]:
        assert soak_files.outcome({**read, **change}, read, without) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("code", "kind"), [("os.kill(os.getpid(), 7)", "crash"), ("time.sleep(99)", "hang")])
def test_crashes_and_hangs_cost_one_case(tmp_path, monkeypatch, code, kind):
    """The reading process is replaced by one that fails at the second of three cases."""
    server = tmp_path / "server.py"
    server.write_text(
        "import json, os, sys, time\n"
        "print('ready', flush=True)\n"
        "for number in range(int(sys.argv[3]), 3):\n"
        f"    if number == 1: {code}\n"
        "    print(json.dumps({'kind': 'error', 'text': str(number)}), flush=True)\n"
    )
    monkeypatch.setattr(soak_files, "__file__", str(server))
    results = soak_files.read_all([("x", "yaml")] * 3, tmp_path, 0.5)
    assert [found["kind"] for found in results] == ["error", kind, "error"]


def test_exceptions_are_told_apart(tmp_path, monkeypatch):
    from ldm.util import UserError

    (tmp_path / "mpi.npz").touch()
    for error, wanted in [
        (UserError("mpi.npz is damaged"), "error"),
        (UserError("something is damaged"), "unclear"),
        (UserError("mpi.npz\nis damaged"), "unclear"),
        (ValueError("mpi.npz is damaged"), "traceback"),
        (KeyError("mpi.npz"), "traceback"),
    ]:

        def read(folder, error=error):
            raise error

        monkeypatch.setitem(FORMATS, "npz packed", soak_files.FORMATS["npz packed"].__class__(Path, read))
        assert soak_files.read_case(tmp_path, "npz packed")["kind"] == wanted
