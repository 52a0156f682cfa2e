"""Each reader against the pixels that the test wrote."""

import os
import pickle
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from data_files import (
    DATA_SETS,
    attribute_table,
    car_mesh,
    face,
    grid_labels,
    noise,
    small,
    write_cars3d,
    write_celeba,
    write_celeba_lmdb,
    write_dsprites,
    write_mpi3d,
    write_shapes3d,
)
from PIL import Image

from ldm.data import cache, formats
from ldm.data.dis import Cars3DTrain, CelebATrain, DSpritesTrain, ImageFolder, MPI3DTrain, Shapes3D, Shapes3DTrain
from ldm.factors import factors_of
from ldm.util import UserError, instantiate_from_config

SIZES = (2, 3, 2, 2, 2, 3)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (7, 64, 64, 3)}, {"chunks": (50, 16, 64, 1), "compression": "gzip"}],
    ids=["contiguous", "chunked", "packed"],
)
def test_shapes3d_gives_the_pixels_of_the_file(tmp_path, options, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 20 * 64 * 64 * 3)  # several blocks
    path = write_shapes3d(tmp_path, SIZES, **options)
    dataset = Shapes3DTrain(tmp_path)
    wanted = noise(144)
    assert (len(dataset), dataset.image_size, dataset.channels) == (144, 64, 3)
    assert dataset.grid.sizes == SIZES and dataset.grid.names[0] == "floor hue"
    np.testing.assert_array_equal(dataset.images, wanted)
    caches = list(path.parent.glob("*.npy"))
    assert len(caches) == bool(options)  # contiguous pixels are mapped in place
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, *(p.name for p in caches)])


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_every_data_set_offers(tmp_path, name):
    cls, files = DATA_SETS[name], small(DATA_SETS[name])
    dataset = cls(path=files.write(tmp_path), **files.params)
    assert len(dataset) == files.count
    batch = dataset.fetch([files.count - 1, 0])
    shape = (dataset.image_size, dataset.image_size, dataset.channels)
    assert batch["image"].shape == (2, *shape) and batch["image"].dtype == torch.uint8
    assert batch["idx"].tolist() == [files.count - 1, 0]
    item = dataset[0]["image"]
    assert item.shape == shape and item.dtype == torch.float32 and -1 <= item.min() < item.max() <= 1
    factors = factors_of(dataset)
    assert factors is None or len(factors) == files.count
    assert pickle.loads(pickle.dumps(dataset)).fetch([0])["image"].equal(batch["image"][1:])


def test_a_batch_is_uint8_and_an_item_is_normalised(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    dataset, wanted = Shapes3DTrain(tmp_path), noise(144)
    batch = dataset.__getitems__([9, 3, 140])
    assert batch["image"].dtype == torch.uint8 and batch["idx"].dtype == torch.int64
    np.testing.assert_array_equal(batch["image"], wanted[[9, 3, 140]])
    assert batch["idx"].tolist() == [9, 3, 140]
    item = dataset[-1]
    assert item["image"].dtype == torch.float32 and item["idx"] == 143
    np.testing.assert_allclose(item["image"], wanted[143] / 127.5 - 1, atol=1e-6)
    with pytest.raises(IndexError):
        dataset.fetch([144])
    with pytest.raises(IndexError):
        dataset[144]


def test_a_pickled_data_set_holds_no_pixels(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    dataset = Shapes3DTrain(tmp_path)
    data = pickle.dumps(dataset)
    assert len(data) < 3000
    np.testing.assert_array_equal(pickle.loads(data).images, dataset.images)


def test_where_the_files_are_looked_for(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path / "data", SIZES)
    assert len(Shapes3DTrain(path)) == 144
    monkeypatch.chdir(tmp_path)
    assert len(Shapes3DTrain()) == 144
    monkeypatch.chdir("/")
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path / "data"))
    assert len(Shapes3DTrain()) == 144


def test_the_originals_snippet_works(tmp_path):
    write_shapes3d(tmp_path, SIZES)

    class Edited(Shapes3D):
        def __init__(self, **kwargs):
            super().__init__(path=tmp_path, original_resolution=None, **kwargs)

    assert len(Edited()) == 144
    assert Edited(image_size=16).image_size == 16
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(tmp_path), "original_resolution": 64}}
    assert len(instantiate_from_config(node)) == 144


def test_resizing_is_pillows(tmp_path):
    write_shapes3d(tmp_path, SIZES)
    dataset = Shapes3DTrain(tmp_path, image_size=16)
    wanted = Image.fromarray(noise(144)[100]).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(dataset.images[100], np.asarray(wanted))
    assert dataset.image_size == 16


def test_a_changed_source_is_converted_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    Shapes3DTrain(tmp_path)
    (first,) = path.parent.glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_convert", lambda *args: pytest.fail("converted twice"))
        Shapes3DTrain(tmp_path)
    other = noise(144, seed=5)
    write_shapes3d(tmp_path, SIZES, images=other, chunks=(10, 64, 64, 3))
    os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, other)
    (second,) = path.parent.glob("*.npy")
    assert first != second


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(formats, "_put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Shapes3DTrain(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, noise(144))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    monkeypatch.setattr(cache.os, "access", lambda folder, mode: folder != path.parent)
    with pytest.raises(UserError, match="ENCDIFF_CACHE"):
        Shapes3DTrain(tmp_path)
    monkeypatch.setenv("ENCDIFF_CACHE", str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, noise(144))
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    Shapes3DTrain(tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("ldm.data.files.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="GB are free"):
        Shapes3DTrain(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_sizes_given_by_hand_need_no_labels(tmp_path):
    path = write_shapes3d(tmp_path, SIZES)
    with h5py.File(path, "r+") as file:
        del file["labels"]
    assert Shapes3DTrain(tmp_path, factor_sizes=[12, 12]).grid.sizes == (12, 12)


def test_real_label_values_give_the_real_grid():
    from ldm.data.dis import grid_of_labels

    labels = grid_labels((10, 10, 10, 8, 4, 15))
    assert grid_of_labels(labels, Shapes3D.names, "labels").sizes == (10, 10, 10, 8, 4, 15)


@pytest.mark.parametrize(("variant", "packed"), [("toy", True), ("toy", False), ("real_complex", True)])
def test_mpi3d(tmp_path, variant, packed, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 5 * 64 * 64 * 3)
    path = write_mpi3d(tmp_path, 24, variant=variant, packed=packed)
    dataset = MPI3DTrain(tmp_path, variant=variant, factor_sizes=(1, 1, 1, 2, 3, 2, 2))
    np.testing.assert_array_equal(dataset.images, noise(24))
    assert dataset.grid.names[3] == "camera height"
    assert len(list(path.parent.glob("*.npy"))) == packed  # a stored array is mapped in place


def test_variants_of_mpi3d_have_their_published_sizes():
    images = {variant: int(np.prod(sizes)) for variant, sizes in MPI3DTrain.variants.items()}
    assert images == {"toy": 1036800, "realistic": 1036800, "real": 1036800, "real_complex": 460800}


def test_an_npz_with_other_arrays_before_is_mapped_at_the_right_place(tmp_path):
    path = tmp_path / "any.npz"
    np.savez(path, labels=np.arange(999.0), images=noise(3, 8))
    dataset = MPI3DTrain(path, factor_sizes=[3])
    np.testing.assert_array_equal(dataset.images, noise(3, 8))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("images.npy").compress_type == zipfile.ZIP_STORED


def test_dsprites(tmp_path):
    write_dsprites(tmp_path, 12)
    wanted = (noise(12, channels=None) % 2) * 255
    dataset = DSpritesTrain(tmp_path, factor_sizes=(3, 2, 2))
    np.testing.assert_array_equal(dataset.images, wanted)
    batch = dataset.fetch([5, 0])["image"]
    assert batch.shape == (2, 64, 64, 3) and dataset.channels == 3
    np.testing.assert_array_equal(batch, wanted[[5, 0]][..., None].repeat(3, -1))
    grey = DSpritesTrain(tmp_path, factor_sizes=(3, 2, 2), channels=1)
    np.testing.assert_array_equal(grey[5]["image"][..., 0], wanted[5] / 127.5 - 1)


def test_cars3d_rows_are_elevation_azimuth_car(tmp_path):
    folder = write_cars3d(tmp_path, cars=3)
    dataset = Cars3DTrain(tmp_path)
    assert dataset.grid.sizes == (4, 24, 3) and len(dataset) == 288 and dataset.image_size == 64
    for elevation, azimuth, car in [(0, 0, 0), (3, 23, 2), (1, 7, 2), (2, 0, 1)]:
        row = dataset.grid.index(np.array([[elevation, azimuth, car]]))[0]
        assert row == (elevation * 24 + azimuth) * 3 + car
        picture = Image.fromarray(np.ascontiguousarray(car_mesh(car)[..., azimuth, elevation]))
        np.testing.assert_array_equal(dataset.images[row], picture.resize((64, 64), Image.Resampling.LANCZOS))
    assert len(Cars3DTrain(folder, image_size=32)) == 288


def test_celeba_crop_and_attributes(tmp_path):
    folder = write_celeba(tmp_path)
    dataset = CelebATrain(tmp_path)
    assert dataset.grid is None and len(dataset) == 4 and dataset.image_size == 64
    picture = np.asarray(Image.open(folder / "000003.jpg"))[57:185, 25:153]
    wanted = Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(dataset.images[2], np.asarray(wanted))
    np.testing.assert_array_equal(dataset.attributes, attribute_table(4)[1])
    assert dataset.attribute_names[39] == "Attribute_39"


@pytest.mark.parametrize("resolution", [None, 218])
def test_celeba_from_an_lmdb(tmp_path, resolution):
    path = write_celeba_lmdb(tmp_path, resolution=resolution)
    dataset = CelebATrain(tmp_path, original_resolution=resolution)
    picture = Image.fromarray(np.asarray(face(1))[57:185, 25:153]).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(dataset.images[1], np.asarray(picture))
    assert dataset.attributes is None
    (path.parent / "list_attr_celeba.txt").write_text(attribute_table(4)[0])
    again = CelebATrain(path, original_resolution=resolution)
    np.testing.assert_array_equal(again.attributes, attribute_table(4)[1])


def test_a_folder_of_images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for name, size in [("z.png", (40, 20)), ("b/a.jpg", (16, 16)), ("A.PNG", (10, 30))]:
        Image.fromarray(noise(1, 64)[0]).resize(size).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    dataset = ImageFolder(folder, image_size=8)
    assert dataset.files == ["A.PNG", "b/a.jpg", "z.png"] and dataset.grid is None
    wanted = np.asarray(Image.open(folder / "z.png"))[:, 10:30]
    np.testing.assert_array_equal(dataset.images[2], Image.fromarray(wanted).resize((8, 8), Image.Resampling.LANCZOS))


def test_the_cache_is_where_the_variable_says(tmp_path, monkeypatch):
    path = write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    monkeypatch.setenv("ENCDIFF_CACHE", str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, noise(144))
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_of_several_processes_one_converts(tmp_path):
    """Started at the same moment, as by torchrun, they share one conversion."""
    write_shapes3d(tmp_path, SIZES, chunks=(10, 64, 64, 3))
    code = (
        "import logging, sys; logging.basicConfig(level=20); from ldm.data.dis import Shapes3DTrain;"
        " print(int(Shapes3DTrain(sys.argv[1]).images.sum()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in started]
    assert {out.strip() for out, _ in outputs} == {str(int(noise(144).sum()))}, outputs
    assert sum("converted" in err for _, err in outputs) == 1
