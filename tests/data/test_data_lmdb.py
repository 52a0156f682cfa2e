"""The reader of LMDB files against LMDB itself, which writes them; damaged ones."""

import subprocess
import sys
from itertools import islice

import lmdb
import numpy as np
import pytest
from data_files import write_celeba_lmdb

from ldm.data.dis import CelebATrain
from ldm.data.lmdb_file import LMDBReader
from ldm.util import UserError


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A file that was written in several steps, with a tree of three levels, and its content."""
    folder, content, rng = tmp_path_factory.mktemp("lmdb"), {}, np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=1 << 27) as environment:
        for part in range(4):
            with environment.begin(write=True) as transaction:
                for index in range(part * 300, part * 300 + 350):
                    key = f"64-{index:07d}".encode()
                    content[key] = rng.bytes(int(rng.choice([0, 1900, 1900, 5000])))
                    transaction.put(key, content[key])
                for index in range(part * 100, part * 100 + 50):
                    transaction.delete(f"64-{index:07d}".encode())
                    content.pop(f"64-{index:07d}".encode())
    return folder / "data.mdb", content


def test_every_value_is_that_of_lmdb(database):
    path, content = database
    with path.open("rb") as file:
        reader = LMDBReader(file)
        assert reader.depth == 3
        for key, value in content.items():
            assert reader.get(key) == value
        assert [reader.get(key) for key in (b"", b"6", b"64-0000000", b"64-00003990", b"65", b"z")] == [None] * 6
        assert {key: reader.read(place) for key, place in reader.items()} == content


def test_an_empty_database(tmp_path):
    lmdb.open(str(tmp_path)).close()
    with (tmp_path / "data.mdb").open("rb") as file:
        assert LMDBReader(file).get(b"x") is None and not list(LMDBReader(file).items())


def test_whatever_is_damaged_is_noticed_or_does_not_matter(database, tmp_path):
    """Page headers, lists of nodes and the files' ends; values have no checksums."""
    path, content = database
    data, rng, keys = path.read_bytes(), np.random.default_rng(1), sorted(content)
    noticed = 0
    for number in range(60):
        damaged = bytearray(data)
        if number % 10 == 0:
            damaged = damaged[: rng.integers(len(data))]
        else:
            page = int(rng.integers(2) if number % 3 == 0 else rng.integers(len(data) // 4096))
            damaged[page * 4096 + int(rng.integers(160 if page < 2 else 60))] ^= 1 << int(rng.integers(8))
        (tmp_path / "data.mdb").write_bytes(damaged)
        with (tmp_path / "data.mdb").open("rb") as file:
            try:
                reader = LMDBReader(file)
                found = [reader.get(keys[k]) for k in range(0, len(keys), 97)] + [len(list(islice(reader.items(), 50)))]
                assert all(value is None or isinstance(value, bytes | int) for value in found)
            except (ValueError, EOFError):
                noticed += 1
    assert noticed > 8


@pytest.mark.slow
def test_a_truncated_lmdb_does_not_end_the_process(tmp_path):
    path = write_celeba_lmdb(tmp_path, count=40) / "data.mdb"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    code = (
        "import sys; from ldm.data.dis import CelebATrain; from ldm.util import UserError\n"
        "try: CelebATrain(sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "celeba.lmdb (truncated" in done.stdout, done
    assert not list(tmp_path.rglob("*.npy"))


def test_a_count_below_or_far_above_the_number_of_pictures(tmp_path):
    write_celeba_lmdb(tmp_path / "a", length=b"3")
    with pytest.raises(UserError, match="says it has 3 images as 'length', but has more"):
        CelebATrain(tmp_path / "a")
    write_celeba_lmdb(tmp_path / "b", length=b"999999999999999")
    with pytest.raises(UserError, match="no key 'None-0000004'"):
        CelebATrain(tmp_path / "b")
