"""scripts/check_data.py: every file is read to its end."""

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import check_data
from data_files import noise, write_cars3d, write_celeba, write_celeba_lmdb, write_mpi3d, write_shapes3d

from ldm.data import checksums
from ldm.data.dis import Shapes3DTrain
from ldm.data.rendered import RenderedTrain
from ldm.evaluation.files import write_codes

SIZES = (1, 1, 2, 2, 2, 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a file of each kind, those of this project with several blocks."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK", 1000)
        patch.delenv("ENCDIFF_CACHE", raising=False)
        write_shapes3d(folder, SIZES, 16, chunks=(5, 16, 16, 3), compression="gzip")
        Shapes3DTrain(folder)
        RenderedTrain(folder, sizes=[1, 1, 1, 1, 2, 3], image_size=16)
        write_codes(folder / "codes.npy", noise(3)[..., 0].reshape(3, -1))
    write_mpi3d(folder, 3)
    write_mpi3d(folder, 3, variant="real", packed=False)
    write_cars3d(folder, 1, 2, 2)
    write_celeba(folder, 2)
    write_celeba_lmdb(folder, 3)
    with h5py.File(folder / "plain.h5", "w") as file:
        file["images"] = noise(3)
    return folder


@pytest.fixture
def data(written, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.delenv("ENCDIFF_CACHE", raising=False)
    return Path(shutil.copytree(written, tmp_path / "data"))


def test_good_files(data, capsys):
    assert check_data.main([str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "12 files are good, 0 damaged"
    told = {Path(line.split(" (")[0].removeprefix("ok ")).name: line.split("(")[-1] for line in lines[:-1]}
    assert told["codes.npy"] == told["rooms-16-1x1x1x1x2x3.h5"] == "checksums)"
    assert told["3dshapes.h5"] == told["mpi3d_real.npz"] == "the format's own checksums)"
    assert told["plain.h5"] == told["data.mdb"] == "no checksums: structure only)"


@pytest.mark.parametrize(
    "name",
    ["3dshapes.h5", "3dshapes.h5.16x16x3-*.npy", "rooms-*.h5", "mpi3d_toy.npz", "mpi3d_real.npz", "car_000_mesh.mat",
     "codes.npy", "data.mdb"],
)  # fmt: skip
def test_a_flipped_byte_in_the_middle(data, capsys, name):
    (path,) = data.rglob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert check_data.main([str(data)]) == 1
    out = capsys.readouterr().out
    assert out.count("DAMAGED") == 1 and f"DAMAGED {path}: " in out and "11 files are good, 1 damaged" in out


def test_a_truncated_picture_and_paths_that_do_not_exist(data, capsys):
    path = next(data.rglob("*.jpg"))
    path.write_bytes(path.read_bytes()[:2000])
    assert check_data.main([str(data / "celeba"), str(data / "codes.npy")]) == 1
    assert f"DAMAGED {path}" in capsys.readouterr().out
    assert check_data.main([str(data / "none")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    (data / "x.txt").touch()
    assert check_data.main([str(data / "x.txt")]) == 2


def test_the_folders_of_the_environment(data, capsys, monkeypatch):
    monkeypatch.setenv("ENCDIFF_DATA", str(data / "celeba"))
    monkeypatch.setenv("ENCDIFF_CACHE", str(data / "cache"))
    (data / "cache").mkdir()
    np.save(data / "cache" / "x.npy", np.zeros(3))
    assert check_data.main([]) == 0
    assert "4 files are good" in capsys.readouterr().out
