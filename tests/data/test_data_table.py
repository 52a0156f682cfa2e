"""A folder of pictures with a table of attributes, and pictures of every kind in it."""

import logging
import unicodedata

import numpy as np
import pytest
from PIL import Image

from ldm.data.dis import ImageFolder
from ldm.data.table import read_table
from ldm.factors import factors_of
from ldm.util import UserError

FILES = ["a.png", "b/ü ñ.png", "we,ird.png"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    for k, name in enumerate(FILES):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / name)
    return tmp_path


def table(folder, text, encoding="utf-8"):
    (folder / "t.csv").write_bytes(text.encode(encoding))
    return ImageFolder(folder, 8, table="t.csv")


RIGHT = {
    "plain": 'file,colour,n\na.png,red,10\nb/ü ñ.png,blue,9\n"we,ird.png",red,9\n',
    "another order, an empty line": 'n, file ,colour\n9,"we,ird.png",red\n\n 9 ,b/ü ñ.png, blue\n10,a.png,red\n',
    "odd characters": 'file,colour,n,note\na.png,red,10,"y\nz"\nb/ü ñ.png,blue,9,v\u2028\x85w\n'
    + '"we,ird.png",red,9,"y\nz"\n',
    "Excel's": "\ufefffile;colour;n\r\na.png;red;10\r\nb\\ü ñ.png;blue;9\r\nwe,ird.png;red;9\r\n",
    "tabs, and macOS's ü": unicodedata.normalize("NFD", "file\tcolour\tn\n./a.png\tred\t10\nb/ü ñ.png\tblue\t9\n")
    + "we,ird.png\tred\t9\n",
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_table(folder, kind):
    dataset = table(folder, RIGHT[kind])
    assert dataset.files == FILES
    found = dict(zip(dataset.attribute_names, dataset.attributes.T.tolist(), strict=True))
    found.pop("note", None)
    assert found == {"colour": [1, 0, 1], "n": [1, 0, 0]}, "numbered in order: blue, red; 9, 10 as numbers"
    assert factors_of(dataset).names == dataset.attribute_names
    only = ImageFolder(folder, 8, table=str(folder / "t.csv"), attributes=["n"])
    assert only.attribute_names == ("n",) and only.attributes.tolist() == [[1], [0], [0]]
    assert ImageFolder(folder, 8).attributes is None


def test_words_among_numbers_are_told(folder, caplog):
    found = table(folder, "file,x\n" + ROWS.replace("red", "1", 1).replace("blue", "?").replace("red", "1"))
    assert sorted(found.attributes[:, 0].tolist()) == [0, 0, 1]
    assert "'x' has 2 numbers and 1 words, the first '?' in line" in caplog.text


def test_columns_of_one_value_are_left_out(folder, caplog):
    found = table(folder, "file,colour,room,n\n" + "".join(f"{name},{k},lab,{k % 2}\n" for k, name in enumerate(
        ["a.png", "b/ü ñ.png", '"we,ird.png"'])).replace(",1,lab", ",0,lab"))  # fmt: skip
    assert found.attribute_names == ("colour", "n") and found.attributes.shape == (3, 2)
    assert "left out, with one value in all lines: room" in caplog.text


ROWS = 'a.png,red\nb/ü ñ.png,blue\n"we,ird.png",red\n'
WRONG = {
    "no column of files": ("name,colour\n" + ROWS, ["t.csv, line 1, has no column 'file'"]),
    "nearly": ("files,colour\n" + ROWS, ["line 1", "did you mean 'files'?"]),
    "twice": ("file,colour,colour\n" + ROWS.replace("red", "red,x").replace("blue", "blue,x"), ["2 columns 'colour'"]),
    "nothing but files": ("file\na.png\n", ["no column beside 'file'"]),
    "empty": ("", ["t.csv", "a line per picture"]),
    "names only": ("file,colour\n", ["t.csv", "a line per picture"]),
    "no value": ("file,colour\na.png,red\nb/ü ñ.png,\n", ["t.csv, line 3: no value of 'colour'"]),
    "too many values": ("file,colour\na.png,red,blue\n", ["line 2: 3 values for 2 columns"]),
    "a line twice": ("file,colour\n" + ROWS + "\n./a.png,red\n", ["line 6: './a.png' is in line 2 too"]),
    "no line": ("file,colour\na.png,red\n", ["t.csv has no line for the picture 'b/ü ñ.png', nor for 1 more"]),
    "no picture": ("file,colour\n" + ROWS + "c.png,x\nd.png,x\n", ["line 5: there is no picture 'c.png'", "1 more"]),
    "another name": ("file,colour\n" + ROWS.replace("a.png", "A.png"), ["line 2", "'A.png'", "'a.png' is a picture"]),
    "not a number": ("file,x\n" + ROWS.replace("red", "1", 1).replace("blue", "nan").replace("red", "2"),
                     ["t.csv: 'x' has 'nan' in line", "must be finite"]),
    "continuous": ("file,x\n" + ROWS.replace("red", "1.5", 1).replace("blue", "2.5").replace("red", "3"),
                   ["t.csv", "'x' has 3 values in 3 rows", "attributes=[...]"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_table(folder, kind):
    text, expected = WRONG[kind]
    with pytest.raises(UserError) as caught:
        table(folder, text)
    assert all(words in str(caught.value) for words in expected), str(caught.value)


def test_wrong_arguments(folder):
    for arguments, words in [
        ({"table": "none.csv"}, "table: there is no file 'none.csv'"),
        ({"attributes": ["colour"]}, "attributes: columns of which table"),
    ]:
        with pytest.raises(UserError, match=words):
            ImageFolder(folder, 8, **arguments)
    with pytest.raises(UserError, match="path: there is no folder"):
        ImageFolder(folder / "none", 8)
    (folder / "t.csv").write_text("file,colour\n" + ROWS)
    with pytest.raises(UserError, match=r"no column 'color'; did you mean 'colour'"):
        read_table(folder / "t.csv", FILES, "x", ["color"])
    (folder / "t.csv").write_bytes(b"file,colour\n\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*t\.csv"):
        read_table(folder / "t.csv", FILES, "x")


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation, kind):
    """Red is top left, green top right, blue bottom left: stored as each of the eight orientations says."""
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8, 0] = upright[:8, 8:, 1] = upright[8:, :8, 2] = 255
    # Where rows and columns of the upright picture are in the file, by the EXIF standard.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    notes = Image.Exif()
    notes[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{kind}", exif=notes)
    found = ImageFolder(tmp_path, 16).images[0].astype(int)
    for row, column in [(4, 4), (4, 12), (12, 4), (12, 12)]:
        assert abs(found[row, column] - upright[row, column]).max() < 60, (orientation, found[row, column])


def test_odd_folders(folder, caplog):
    """Hidden files are left out; kinds that are not read, and small or broken pictures, are reported."""
    (folder / "._a.png").write_bytes(b"\0\5\26\7")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "b.png").write_bytes(b"x")
    (folder / "phone.HEIC").write_bytes(b"x")
    Image.new("L", (1, 500), 9).save(folder / "thin.gif")
    with caplog.at_level(logging.WARNING):
        dataset = ImageFolder(folder, 8)
    assert dataset.files == [*FILES[:2], "thin.gif", FILES[2]] and (dataset.images[2] == 9).all()
    assert "left out 1 pictures of kinds that are not read (.HEIC)" in caplog.text
    assert "1 pictures are smaller than 8 pixels" in caplog.text and "thin.gif" in caplog.text
    whole = (folder / "a.png").read_bytes()
    for name, data in (("cut.png", whole[:-20]), ("empty.jpg", b""), ("text.jpg", b"I am no picture")):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"3 of 7 pictures cannot be read, and are named in the log.*cut\.png"):
        ImageFolder(folder, 8)
    assert "empty.jpg (truncated, or in another format?): ValueError: it is empty" in caplog.text
    assert "text.jpg" in caplog.text and "it is no picture of a format that is known here" in caplog.text
