"""Codes and factors from files, and records to files."""

import json

import numpy as np
import pytest

from ldm.data.checksums import MAGIC
from ldm.evaluation.files import read_codes, read_factors, write_json
from ldm.util import UserError


def test_numbers_in_a_csv_file_are_numbers(tmp_path):
    """In the order of their values, not of their digits: 2 before 10."""
    numbers = np.arange(60) % 12
    (tmp_path / "f.csv").write_text("angle, kind\n" + "\n".join(f"{5 * n}, k{n % 3}" for n in numbers) + "\n")
    table = read_factors(tmp_path / "f.csv")
    np.testing.assert_array_equal(table.values, np.stack([numbers, numbers % 3], axis=1))
    assert table.names == ("angle", "kind")


def test_codes_in_either_format(tmp_path):
    values = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", codes=values)
    for name in ("a.npy", "a.npz"):
        np.testing.assert_array_equal(read_codes(tmp_path / name), values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, r"there is no file .*none\.npy"),
        ("text.npy", b"1 2 3", r"text\.npy is not a NumPy file of numbers"),
        ("pickled.npy", np.array([{}], dtype=object), r"pickled\.npy is not a NumPy file of numbers"),
        ("two.npz", {"a": np.zeros(2), "b": np.zeros(2)}, r"two\.npz holds 2 arrays \(a, b\); expected factors alone"),
        ("angles.npy", np.linspace(0, 1, 60), r"angles\.npy: factor 'factor 0' has 60 values in 60 rows"),
        ("none.csv", None, r"there is no file .*none\.csv"),
        ("short.csv", b"a,b\n1,2\n3\n", r"short\.csv: line 3 has 1 entries, the first line names 2"),
        ("empty.csv", b"a,b\n", r"empty\.csv has no rows"),
        ("gap.csv", b"a,b\n1,\n", r"gap\.csv: line 2 has an empty entry"),
        ("numbers.csv", b"1,2\n1,2\n", r"numbers\.csv: the first line holds numbers"),
        ("word.csv", b"a,b\n1,x\nn/a,y\n3,z\n", r"word\.csv: 'a' has 2 numbers and 1 words, the first 'n/a' in line 3"),
        ("nan.csv", b"a,b\n1,x\nnan,y\n", r"nan\.csv: 'a' has 'nan' in line 3: factor values must be finite"),
        ("zeros.csv", b"a,b\n1,\x00\x00\n", r"zeros\.csv has control characters"),
        ("quote.csv", b"a,b\n1,2\n" + b'"' + b"x" * 140000, r"quote\.csv is not a table"),
        ("latin.csv", b"a,b\n\xe9,1\n", r"latin\.csv is not text in UTF-8"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_factors(path)


def test_records_are_plain_json(tmp_path):
    record = {"a": np.float64(0.5), "b": (1, np.array([np.nan, np.inf])), 3: {"c": True}}
    write_json(tmp_path / "new" / "record.json", record)
    expected = {"a": 0.5, "b": [1, [None, None]], "3": {"c": True}}
    assert json.loads((tmp_path / "new" / "record.json").read_text()) == expected
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the folder .*file"):
        write_json(tmp_path / "file" / "record.json", {})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]


def saved(path, array) -> bytes:
    np.save(path, array)
    return path.read_bytes()


def test_a_flipped_bit_in_the_header_of_codes(tmp_path):
    """Each is an error of one line, or an array of the same numbers."""
    path, values = tmp_path / "codes.npy", np.arange(12.0).reshape(6, 2)
    whole = saved(path, values)
    for place in range(0, 8 * 128, 3):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = read_codes(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        same = found.size == values.size and sorted(found.tobytes()) == sorted(values.tobytes())
        assert same and found.dtype.itemsize == 8, (place, found)


def test_codes_with_something_behind_them(tmp_path):
    path = tmp_path / "codes.npy"
    whole = saved(path, np.zeros((6, 2)))
    for more in (b"x", MAGIC, saved(tmp_path / "other.npy", np.ones(3))):
        path.write_bytes(whole + more)
        with pytest.raises(ValueError, match=r"codes\.npy"):
            read_codes(path)


def test_codes_in_a_damaged_zip(tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, codes=np.arange(600.0))
    whole = path.read_bytes()
    noticed = set()
    for place in [*range(0, len(whole), 131), 3000, *range(len(whole) - 100, len(whole), 3)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(read_codes(path), np.arange(600.0))
        except ValueError as error:
            assert f"{path} is not a NumPy file of numbers" in str(error) and "\n" not in str(error)
            noticed.add(place)
    assert {0, 131, 3000} <= noticed
