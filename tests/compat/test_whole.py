"""Files of checkpoints: damage is found by their checksums, and the newest whole one of a folder by its step."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ldm.compat.checkpoints import read_checkpoint, read_state_dict
from ldm.compat.whole import damage, instead_of, newest_whole, sealed, training_step
from ldm.util import UserError

WEIGHTS = {"a": torch.arange(1000.0), "b": torch.full((3, 5), 2.5)}


def write(path: Path, step: int = 3, **more: object) -> Path:
    """A checkpoint that can be told from its weights alone."""
    content = {"state_dict": WEIGHTS, "loops": {}, "optimizer_states": [], "global_step": step, **more}
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def flip(path: Path, position: int, bit: int = 4) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return path


def record(path: Path, ending: str) -> tuple[int, int]:
    """Where a record of an archive begins, and its size."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith(ending))
        data = archive.read(entry)
    return path.read_bytes().index(data), len(data)


@pytest.mark.parametrize("ending", ["/data/0", "/data.pkl", "/version"])
def test_a_flipped_bit_is_found(tmp_path, ending):
    path = write(tmp_path / "a.ckpt")
    assert damage(path) is None
    start, size = record(path, ending)
    flip(path, start + size // 2, bit=0)
    assert f"the checksum of its part 'a{ending}' is wrong" in str(damage(path))
    with pytest.raises(UserError, match=rf"a\.ckpt' is damaged.*{ending}"):
        read_checkpoint(path)
    if ending == "/data/0":
        assert not torch.equal(torch.load(path, mmap=True)["state_dict"]["a"], WEIGHTS["a"]), "PyTorch would not tell"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_bit_of_an_archives_directory(tmp_path, method):
    """Names, sizes, places, methods: an error, or nothing that matters."""
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(write(tmp_path / "b.ckpt")) as source, zipfile.ZipFile(path, "w", method) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")
    outcomes = set()
    for position in range(start, start + 46 + len("b/data.pkl")):
        for bit in range(0, 8, 1 if position < start + 46 else 4):
            flip(path, position, bit)
            try:
                state = read_state_dict(path)
            except UserError as error:
                outcomes.add("error")
                assert "a.ckpt" in str(error)
            else:
                outcomes.add("right")
                assert all(torch.equal(state[name], value) for name, value in WEIGHTS.items()), (position, bit)
            path.write_bytes(whole)
    assert outcomes == {"error", "right"}


def test_files_without_checksums_are_read(tmp_path):
    """Those from before PyTorch 1.6, and those that it was told to write so."""
    torch.save({"state_dict": WEIGHTS}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": WEIGHTS}, tmp_path / "new.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.ckpt", "new.ckpt"):
        assert torch.equal(read_state_dict(tmp_path / name)["a"], WEIGHTS["a"]), name


def test_no_file_of_a_checkpoint(tmp_path):
    path = write(tmp_path / "a.ckpt")
    size = path.stat().st_size
    for length in (0, 1, 3, 100, size // 2, size - 1, size - 30):
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(path.read_bytes()[:length])
        assert "is truncated" in str(damage(cut)), length
    assert damage(tmp_path) == "is a folder"
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))  # the last block of a disk was not written
    assert "is truncated" in str(damage(path))


# ---- the newest


def test_the_newest_whole_one(tmp_path):
    """By the step in the file, whatever its name and time; of equals, `last.ckpt`."""
    for name, step in {"last": 8, "epoch=000001": 8, "epoch=000000": 4, "step=000000006": 6}.items():
        write(tmp_path / f"{name}.ckpt", step)
        os.utime(tmp_path / f"{name}.ckpt", (1, 1000 - step))
    write(tmp_path / ".last.ckpt.123.tmp", 9)
    write(tmp_path / ".hidden.ckpt", 9)
    torch.save({"state_dict": WEIGHTS, "global_step": 9}, tmp_path / "weights.ckpt")
    assert newest_whole(tmp_path) == (tmp_path / "last.ckpt", 8, {})
    assert "epoch=000001.ckpt' (step 8)" in instead_of(tmp_path / "last.ckpt")
    flip(tmp_path / "last.ckpt", record(tmp_path / "last.ckpt", "/data/0")[0])
    found, step, wrong = newest_whole(tmp_path)
    assert (found, step, list(wrong)) == (tmp_path / "epoch=000001.ckpt", 8, ["last.ckpt"])
    (tmp_path / "epoch=000001.ckpt").write_bytes(b"")
    found, step, wrong = newest_whole(tmp_path)
    assert (found, step, set(wrong)) == (tmp_path / "step=000000006.ckpt", 6, {"last.ckpt", "epoch=000001.ckpt"})
    # What is older than the one that is taken is of no interest.
    flip(tmp_path / "epoch=000000.ckpt", record(tmp_path / "epoch=000000.ckpt", "/data/0")[0])
    assert set(newest_whole(tmp_path)[2]) == {"last.ckpt", "epoch=000001.ckpt"}
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").mkdir()
    assert newest_whole(tmp_path)[2]["last.ckpt"] == "is a folder"
    shutil.rmtree(tmp_path / "last.ckpt")
    for path in tmp_path.glob("*=*.ckpt"):
        path.write_bytes(path.read_bytes()[:500])
    found, _, wrong = newest_whole(tmp_path)
    assert found is None and len(wrong) == 3 and instead_of(tmp_path / "last.ckpt") == ""
    assert newest_whole(tmp_path / "nowhere") == (None, 0, {})


def test_a_last_checkpoint_that_is_not_the_newest(tmp_path):
    """After `-r` of an older checkpoint, say; it is told."""
    write(tmp_path / "last.ckpt", 5)
    write(tmp_path / "epoch=000001.ckpt", 8)
    assert newest_whole(tmp_path) == (tmp_path / "epoch=000001.ckpt", 8, {"last.ckpt": "is older (step 5)"})


def test_the_step_of_a_real_checkpoint(first_stage, trained_encdiff):
    for path in (first_stage, trained_encdiff.logdir / "checkpoints" / "last.ckpt"):
        assert training_step(path) == torch.load(path, weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("step", ["8", -1, 2.5, True, None])
def test_a_step_that_is_none(tmp_path, step):
    with pytest.raises(ValueError, match="global_step is"):
        training_step(write(tmp_path / "a.ckpt", step))


def test_looking_for_the_step_runs_nothing(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    assert training_step(write(tmp_path / "a.ckpt", hostile=Runs())) == 3
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Runs()))
    assert (tmp_path / "marker").exists(), "the pickle does its harm where it is run"


# ---- safetensors


def test_sealed_files_are_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.writelines(sealed(save(WEIGHTS, {"format": "pt"})))
    found = read_state_dict(path)
    assert set(found) == set(WEIGHTS) and all(torch.equal(found[name], value) for name, value in WEIGHTS.items())
    payload = save({"a": torch.ones(3)})  # without metadata
    path.write_bytes(b"".join(sealed(payload)))
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    # Those of others have no checksum.
    flip(path, path.write_bytes(payload) - 1)
    assert damage(path) is None and not torch.equal(read_state_dict(path)["a"], torch.ones(3))


def test_every_bit_of_a_sealed_file(tmp_path):
    """Of names, types, shapes and tensors: an error, or the right weights."""
    path, small = tmp_path / "a.safetensors", {"a": torch.ones(2, 2), "b": torch.arange(4, dtype=torch.int32)}
    whole = b"".join(sealed(save(small, {"format": "pt"})))
    found = 0
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole)
            flip(path, position, bit)
            try:
                state = {} if (problem := damage(path)) else load_file(path)
            except SafetensorError:
                problem = "found by the format"
            found += bool(problem)
            assert problem or all(torch.equal(state[name], value) for name, value in small.items()), (position, bit)
    assert found > 0.8 * 8 * len(whole)


def test_a_truncated_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    whole = b"".join(sealed(save(WEIGHTS)))
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.safetensors"):
            read_state_dict(path)
