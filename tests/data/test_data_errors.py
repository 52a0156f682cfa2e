"""Every wrong file or key gives one UserError that names it."""

import h5py
import numpy as np
import pytest
import scipy.io
from data_files import (
    DATA_SETS,
    attribute_table,
    grid_labels,
    noise,
    write_cars3d,
    write_celeba,
    write_celeba_lmdb,
    write_dsprites,
    write_mpi3d,
    write_shapes3d,
)
from PIL import Image

from ldm.data import formats
from ldm.data.dis import Cars3DTrain, CelebATrain, DSpritesTrain, ImageFolder, MPI3DTrain, Shapes3DTrain
from ldm.data.rendered import RenderedTrain, render, rooms_grid
from ldm.data.rendered import write_shapes3d as render_shapes3d
from ldm.util import UserError

SIZES = (1, 1, 2, 2, 2, 3)


def refuses(call, *words, **keys):
    """`call` raises a UserError of one line that contains all the words."""
    with pytest.raises(UserError) as caught:
        call(**keys)
    message = str(caught.value)
    assert "\n" not in message.strip()
    for word in words:
        assert str(word) in message, message


def cut(path, keep=0.6):
    """Cut the end off a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "ImageFolder"])
def test_a_missing_file(tmp_path, name):
    refuses(DATA_SETS[name], tmp_path, "path=", "ENCDIFF_DATA", "(it should hold ", "Get ", path=tmp_path)
    refuses(DATA_SETS[name], tmp_path / "nowhere", path=tmp_path / "nowhere")


def test_a_missing_variant_and_an_unknown_one(tmp_path):
    refuses(MPI3DTrain, "mpi_real/mpi3d_real.npz", path=tmp_path, variant="real")
    refuses(MPI3DTrain, "variant", "did you mean 'realistic'", path=tmp_path, variant="realistik")


@pytest.mark.parametrize("options", [{}, {"chunks": (6, 64, 64, 3), "compression": "gzip"}])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.6])
def test_truncated_h5(tmp_path, options, keep):
    path = write_shapes3d(tmp_path, SIZES, **options)
    cut(path, keep)
    refuses(Shapes3DTrain, path, "truncated", path=tmp_path)


def test_h5_whose_chunks_are_damaged(tmp_path):
    path = write_shapes3d(tmp_path, SIZES, chunks=(6, 64, 64, 3), compression="gzip")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    refuses(Shapes3DTrain, path, path=tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_h5_with_other_names_shapes_and_types(tmp_path):
    path = write_shapes3d(tmp_path, SIZES)
    with h5py.File(path, "w") as file:
        file["pictures"] = noise(4)
    refuses(Shapes3DTrain, path, "'images'", "pictures", path=tmp_path)
    for images, words in [
        (noise(24).astype(np.float32), ("uint8", "float32")),
        (noise(24, channels=None), ("(n, h, w, 3)", "(24, 64, 64)")),
        (noise(24, channels=4), ("(n, h, w, 3)", "(24, 64, 64, 4)")),
        (noise(24)[:, :, :32], ("(24, 64, 32, 3)", "square")),
    ]:
        write_shapes3d(tmp_path, SIZES, images=images)
        refuses(Shapes3DTrain, path, *words, path=tmp_path)
    write_shapes3d(tmp_path, images=noise(0), labels=np.zeros((0, 6)))
    refuses(Shapes3DTrain, path, "no images", path=tmp_path)
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = np.uint8(3), np.zeros((4, 6))
    refuses(Shapes3DTrain, path, path=tmp_path)


def test_labels_that_are_not_a_grid_or_in_another_order(tmp_path):
    labels = grid_labels(SIZES)
    write_shapes3d(tmp_path, labels=labels[:-1])
    refuses(Shapes3DTrain, "labels", "24", "23", path=tmp_path)
    write_shapes3d(tmp_path, labels=labels[::-1])
    refuses(Shapes3DTrain, "labels", "grid order", "object hue", "row 0", path=tmp_path)
    swapped = labels.copy()
    swapped[[4, 5]] = swapped[[5, 4]]
    write_shapes3d(tmp_path, labels=swapped)
    refuses(Shapes3DTrain, "grid order", "row 4", "orientation", path=tmp_path)
    write_shapes3d(tmp_path, labels=labels[:, :5])
    refuses(Shapes3DTrain, "labels", "(24, 6)", "(24, 5)", path=tmp_path)
    write_shapes3d(tmp_path, labels=labels, images=noise(20))
    refuses(Shapes3DTrain, "labels", "(20, 6)", "(24, 6)", path=tmp_path)


def test_a_count_that_does_not_fit_the_grid(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    write_mpi3d(tmp_path, 24)
    write_dsprites(tmp_path, 24)
    refuses(Shapes3DTrain, "24 images", "25", "factor_sizes", path=tmp_path, factor_sizes=[5, 5])
    refuses(MPI3DTrain, "24 images", "1036800", "object colour 6", "factor_sizes", path=tmp_path)
    refuses(DSpritesTrain, "24 images", "737280", path=tmp_path)
    assert not list(tmp_path.rglob("*.npy"))  # refused before anything is converted


@pytest.mark.parametrize("sizes", [[], [0, 24], [2.5], ["a"], 24])
def test_invalid_factor_sizes(tmp_path, sizes):
    write_shapes3d(tmp_path, SIZES)
    refuses(Shapes3DTrain, "factor_sizes", path=tmp_path, factor_sizes=sizes)


def test_an_image_size_out_of_range(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    refuses(Shapes3DTrain, "image_size", "at least 1", path=tmp_path, image_size=0)


def test_another_original_resolution(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    refuses(Shapes3DTrain, "original_resolution", "128", "64×64", path=tmp_path, original_resolution=128)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_npz(tmp_path, packed, keep):
    path = write_mpi3d(tmp_path, 24, packed=packed)
    cut(path, keep)
    refuses(MPI3DTrain, path, "truncated", path=tmp_path, factor_sizes=[24])


def test_npz_whose_data_is_damaged(tmp_path):
    path = write_mpi3d(tmp_path, 24)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    refuses(MPI3DTrain, path, path=tmp_path, factor_sizes=[24])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_npz_with_other_names_shapes_and_types(tmp_path):
    path = write_mpi3d(tmp_path, 4)
    np.savez(path, pictures=noise(4))
    refuses(MPI3DTrain, path, "'images'", "pictures", path=tmp_path)
    np.savez(path, images=noise(4).astype(np.int64))
    refuses(MPI3DTrain, path, "uint8", "int64", path=tmp_path)
    np.savez(path, images=np.asfortranarray(noise(4)))
    refuses(MPI3DTrain, path, "Fortran", path=tmp_path, factor_sizes=[4])
    np.savez(path, images=noise(4)[0])
    refuses(MPI3DTrain, path, "(n, h, w, 3)", "(64, 64, 3)", path=tmp_path)
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    refuses(MPI3DTrain, path, "uint8", "object", path=tmp_path)
    np.savez(path, images=noise(0))
    refuses(MPI3DTrain, path, "no images", path=tmp_path)


def test_dsprites_that_is_not_binary_or_of_other_channels(tmp_path):
    path = write_dsprites(tmp_path, 4)
    np.savez_compressed(path, imgs=noise(4, channels=None))
    refuses(DSpritesTrain, path, "pixels 0 and 1", path=tmp_path, factor_sizes=[4])
    write_dsprites(tmp_path, 4)
    refuses(DSpritesTrain, "channels", "1 or 3", path=tmp_path, factor_sizes=[4], channels=2)


def test_cars(tmp_path):
    folder = write_cars3d(tmp_path, cars=2, azimuths=2, elevations=2)
    refuses(Cars3DTrain, "car_000_mesh.mat", "(h, w, 3, 24, 4)", "(128, 128, 3, 2, 2)", path=tmp_path)
    refuses(Cars3DTrain, "2 cars", "(2, 2, 5)", path=tmp_path, factor_sizes=[2, 2, 5])
    scipy.io.savemat(folder / "car_001_mesh.mat", {"mesh": np.zeros(3)})
    refuses(Cars3DTrain, "car_001_mesh.mat", "'im'", "mesh", path=tmp_path, factor_sizes=[2, 2, 2])
    scipy.io.savemat(folder / "car_001_mesh.mat", {"im": np.zeros((128, 128, 3, 2, 2))})
    refuses(Cars3DTrain, "car_001_mesh.mat", "uint8", "float64", path=tmp_path, factor_sizes=[2, 2, 2])
    assert not list(tmp_path.glob("*.npy"))
    for file in folder.iterdir():
        file.unlink()
    refuses(Cars3DTrain, folder, "no files ending in .mat", path=tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.7])
def test_a_truncated_mat(tmp_path, keep):
    folder = write_cars3d(tmp_path, cars=2, azimuths=2, elevations=2)
    cut(folder / "car_001_mesh.mat", keep)
    refuses(Cars3DTrain, "car_001_mesh.mat", "truncated", path=tmp_path, factor_sizes=[2, 2, 2])


def test_a_truncated_jpeg(tmp_path):
    folder = write_celeba(tmp_path)
    cut(folder / "000003.jpg")
    refuses(CelebATrain, "000003.jpg", "truncated", path=tmp_path)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["img_align_celeba", "list_attr_celeba.txt"]
    cut(folder / "000003.jpg", 0)
    refuses(ImageFolder, "000003.jpg", path=folder)


def test_celeba_of_another_size_or_without_images(tmp_path):
    folder = write_celeba(tmp_path)
    Image.new("RGB", (178, 200)).save(folder / "000002.jpg")
    refuses(CelebATrain, "000002.jpg", "178×200", "178×218", path=tmp_path)
    for file in folder.iterdir():
        file.unlink()
    refuses(CelebATrain, folder, "no files ending in .jpg", path=tmp_path)


def test_a_table_of_attributes_that_does_not_match(tmp_path):
    table = write_celeba(tmp_path).parent / "list_attr_celeba.txt"
    for text, words in [
        (attribute_table(3)[0], ("000004.jpg",)),
        (attribute_table(5)[0], ("5 lines",)),
        (attribute_table(4)[0].replace("-1", "0", 1), ("line", "40 values")),
        ("", ("does not match",)),
        ("4\nname,other\n000001.jpg,1,1\n", ("line 3",)),
    ]:
        table.write_text(text)
        refuses(CelebATrain, table, *words, path=tmp_path)
    table.unlink()
    refuses(CelebATrain, table, path=tmp_path)


def test_lmdb(tmp_path):
    path = write_celeba_lmdb(tmp_path / "a", length=b"")
    refuses(CelebATrain, path, "'length'", path=tmp_path / "a")
    path = write_celeba_lmdb(tmp_path / "b", length=b"9")
    refuses(CelebATrain, "None-0000004", "original_resolution", path=tmp_path / "b")
    path = write_celeba_lmdb(tmp_path / "c", resolution=64)
    refuses(CelebATrain, "None-0000000", path=tmp_path / "c")
    path = write_celeba_lmdb(tmp_path / "d")
    cut(path / "data.mdb", 0.0001)
    refuses(CelebATrain, path, path=tmp_path / "d")
    path = write_celeba_lmdb(tmp_path / "e", length=b"0")
    refuses(CelebATrain, path, "number of images", path=tmp_path / "e")


def test_folders_of_images(tmp_path):
    refuses(ImageFolder, tmp_path / "none", path=tmp_path / "none")
    (tmp_path / "notes.txt").write_text("nothing")
    refuses(ImageFolder, tmp_path, "no files ending in", ".jpg", path=tmp_path)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    refuses(ImageFolder, "a.png", path=tmp_path)


def test_rooms_of_impossible_sizes(tmp_path):
    for sizes in [(1, 2, 3), (1, 1, 1, 1, 5, 1), (0, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, "a"), 7]:
        refuses(rooms_grid, "sizes", sizes=sizes)
    refuses(RenderedTrain, "image_size", path=tmp_path, sizes=[1] * 6, image_size=0)
    assert not list(tmp_path.iterdir())
    assert render((1,) * 6, 8).shape == (1, 8, 8, 3)


def test_an_mpi3d_file_of_four_colours_is_told_apart(monkeypatch, tmp_path):
    """Without writing 460,800 images: only the header of the array is read before the check."""
    write_mpi3d(tmp_path, 1)
    monkeypatch.setattr(formats, "_npy_header", lambda stream: ((460800, 64, 64, 3), np.dtype(np.uint8), False))
    refuses(MPI3DTrain, "460800 images", "variant=real_complex", "[4, 4, 2, 3, 3, 40, 40]", path=tmp_path)


def test_rendering_leaves_a_file_alone_that_it_did_not_write(tmp_path):
    path = write_shapes3d(tmp_path, SIZES)
    before = path.read_bytes()
    refuses(render_shapes3d, path, "not rendered here", path=path, sizes=[1] * 6, force=True)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refuses(RenderedTrain, tmp_path / "file", path=tmp_path / "file", sizes=[1] * 6)
