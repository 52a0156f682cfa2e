"""Converted files in a folder that several users share."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_files import noise, write_shapes3d

from ldm.data import cache
from ldm.data.dis import Shapes3DTrain
from ldm.util import UserError

SIZES = (1, 1, 2, 2, 2, 3)
OTHER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to give files to another user")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """The folder, and the name that the converted file will have there."""
    write_shapes3d(tmp_path / "data", SIZES, chunks=(10, 64, 64, 3))
    monkeypatch.setenv("ENCDIFF_CACHE", str(tmp_path / "shared"))
    Shapes3DTrain(tmp_path / "data")
    (path,) = (tmp_path / "shared").iterdir()
    path.unlink()
    return path


def images(path: Path) -> np.ndarray:
    return Shapes3DTrain(path.parents[1] / "data").images


def own(path: Path) -> Path:
    return path.parent / f"user-{os.geteuid()}" / path.name


def test_a_planted_link_is_not_followed(shared):
    victim = shared.parents[1] / "victim.npy"
    np.save(victim, noise(24, seed=7))
    before = victim.read_bytes()
    shared.symlink_to(victim)
    np.testing.assert_array_equal(images(shared), noise(24))
    assert victim.read_bytes() == before and own(shared).is_file()
    assert own(shared).parent.stat().st_mode & 0o777 == 0o700
    shared.unlink()
    shared.symlink_to(shared.parents[1] / "nowhere")
    np.testing.assert_array_equal(images(shared), noise(24))
    assert not (shared.parents[1] / "nowhere").exists()


@needs_root
def test_a_planted_array_is_not_taken(shared, caplog):
    np.save(shared, noise(24, seed=7))
    os.chown(shared, OTHER, OTHER)
    np.testing.assert_array_equal(images(shared), noise(24))
    assert "another user's" in caplog.text and own(shared).is_file()


@needs_root
def test_the_owner_of_folder_or_source_may_convert_for_others(shared):
    np.save(shared, noise(24, seed=7))
    os.chown(shared, OTHER, OTHER)
    os.chown(shared.parent, OTHER, OTHER)
    np.testing.assert_array_equal(images(shared), noise(24, seed=7))
    os.chown(shared.parent, 0, 0)
    (source,) = (shared.parents[1] / "data").rglob("*.h5")
    os.chown(source, OTHER, OTHER)
    np.testing.assert_array_equal(images(shared), noise(24, seed=7))


@pytest.mark.parametrize("planted", ["link", "file", pytest.param("folder", marks=needs_root)])
def test_what_is_planted_as_the_own_folder(shared, planted):
    shared.symlink_to("nowhere")
    folder, elsewhere = own(shared).parent, shared.parents[1] / "elsewhere"
    elsewhere.mkdir()
    if planted == "link":
        folder.symlink_to(elsewhere)
    elif planted == "file":
        folder.touch()
    else:
        folder.mkdir()
        os.chown(folder, OTHER, OTHER)
    with pytest.raises(UserError, match=r"not a folder of yours.*ENCDIFF_CACHE"):
        images(shared)
    assert not list(elsewhere.iterdir())


def test_a_map_is_opened_again_under_the_same_conditions(shared):
    """As worker processes do."""
    dataset = Shapes3DTrain(shared.parents[1] / "data")
    state = dataset.__getstate__()
    shared.rename(shared.with_name("moved"))
    shared.symlink_to(shared.with_name("moved"))
    with pytest.raises(UserError, match="it is a link"):
        dataset.__setstate__(state)


def test_a_full_disk_while_converting(shared, monkeypatch):
    """Space is claimed before anything is mapped: writing to a map without it would end the process."""
    monkeypatch.setattr(cache, "require_space", lambda *args, **kwargs: None)
    monkeypatch.setattr("ldm.data.cache.add_checksums", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match=r"cannot write .*\.npy: No space left.*free some space, or .*ENCDIFF_CACHE"):
        images(shared)
    assert not list(shared.parent.iterdir())
