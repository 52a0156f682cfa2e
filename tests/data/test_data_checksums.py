"""Checksums of what is rendered, converted and saved here."""

import zlib

import h5py
import numpy as np
import pytest
from data_files import noise, write_shapes3d

from ldm.data import checksums
from ldm.data.checksums import add_checksums, check_content, read_checksums
from ldm.data.dis import Shapes3DTrain
from ldm.data.rendered import RenderedTrain, render
from ldm.data.rendered import write_shapes3d as render_shapes3d
from ldm.evaluation.files import read_codes, write_codes
from ldm.util import UserError

SIZES = (1, 1, 2, 2, 2, 3)
ROOMS = (1, 1, 1, 1, 2, 2)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of 5 blocks, and its content."""
    monkeypatch.setattr(checksums, "BLOCK", 1000)
    content = noise(1, 40).tobytes()[:4321]
    (tmp_path / "file").write_bytes(content)
    add_checksums(tmp_path / "file")
    return tmp_path / "file", content


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_trailer(file):
    path, content = file
    assert path.read_bytes()[:4321] == content
    with path.open("rb") as opened:
        found = read_checksums(opened)
        assert check_content(opened, path, "") == 4321
    assert found.size == 4321 and found.block == 1000
    assert found.crc32 == [zlib.crc32(content[k : k + 1000]) for k in range(0, 4321, 1000)]


@pytest.mark.parametrize(("place", "part", "full"), [(0, True, True), (4320, True, True), (2500, False, True)])
def test_first_and_last_block_when_opened_and_all_on_request(file, place, part, full):
    path, _ = file
    flip(path, place)
    with path.open("rb") as opened:
        for everything, found in ((False, part), (True, full)):
            if found:
                with pytest.raises(UserError, match=rf"{path} is damaged \(bytes {place // 1000 * 1000} to .*: delete"):
                    check_content(opened, path, "delete it", everything)
            else:
                check_content(opened, path, "delete it", everything)


def test_every_bit_of_the_trailer_counts(file):
    """Damaged, it is either noticed, or no trailer any more."""
    path, _ = file
    whole = path.read_bytes()
    for place in range(4321, len(whole)):
        flip(path, place)
        with path.open("rb") as opened:
            try:
                assert check_content(opened, path, "") == len(whole) and place >= len(whole) - len(checksums.MAGIC)
            except UserError as error:
                assert "damaged" in str(error)
        path.write_bytes(whole)


def test_a_converted_file_has_them_and_older_ones_do_not_need_them(tmp_path):
    write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    Shapes3DTrain(tmp_path)
    (cache,) = tmp_path.rglob("*.npy")
    np.testing.assert_array_equal(np.load(cache), noise(24))  # NumPy does not mind
    whole = cache.read_bytes()
    flip(cache, len(whole) // 2)
    with pytest.raises(UserError, match=r"\.npy is damaged.*delete it, and it will be converted again"):
        Shapes3DTrain(tmp_path)
    np.save(cache, noise(24))
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, noise(24))


@pytest.mark.parametrize("change", [np.asfortranarray, lambda x: x.view(np.int8), lambda x: x[:-1], lambda x: x[None]])
def test_a_converted_file_of_another_layout(tmp_path, change):
    write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    Shapes3DTrain(tmp_path)
    (cache,) = tmp_path.rglob("*.npy")
    np.save(cache, change(noise(24)))
    with pytest.raises(UserError, match=r"\.npy is damaged"):
        Shapes3DTrain(tmp_path)


def test_rendered_rooms(tmp_path):
    path = tmp_path / "shapes3d" / "3dshapes.h5"
    render_shapes3d(path, ROOMS, 8, progress=False)
    whole = path.read_bytes()
    for place in (whole.index(render(ROOMS, 8).tobytes()) + 100, 8, len(whole) - 30):
        flip(path, place)
        with pytest.raises(UserError, match=r"3dshapes\.h5"):
            Shapes3DTrain(tmp_path)
        path.write_bytes(whole)
    path.write_bytes(whole[: whole.rindex(b'{"size')])  # the trailer alone is missing
    with pytest.raises(UserError, match="checksums, is missing"):
        Shapes3DTrain(tmp_path)
    with h5py.File(path, "w") as file:  # as rendered by an earlier version
        file.attrs["rendered_sizes"] = ROOMS
        file["images"], file["labels"] = render(ROOMS, 8), np.zeros((4, 6))
    assert not render_shapes3d(path, ROOMS, 8)
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path, factor_sizes=[4]).images, render(ROOMS, 8))


def test_damaged_rooms_are_not_taken_for_somebody_elses(tmp_path):
    RenderedTrain(tmp_path, sizes=ROOMS, image_size=8)
    (path,) = tmp_path.rglob("*.h5")
    flip(path, 0)
    with pytest.raises(UserError, match=r"is damaged.*it will be rendered again"):
        RenderedTrain(tmp_path, sizes=ROOMS, image_size=8)


def test_saved_codes(tmp_path):
    codes = np.random.default_rng(0).normal(size=(60, 3))
    write_codes(tmp_path / "new" / "codes.npy", codes)
    np.testing.assert_array_equal(read_codes(tmp_path / "new" / "codes.npy"), codes)
    flip(tmp_path / "new" / "codes.npy", 700)
    with pytest.raises(UserError, match=r"codes\.npy is damaged"):
        read_codes(tmp_path / "new" / "codes.npy")
