"""Files are written whole or not at all; locks; what killed processes leave; a second user."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from ldm.data import files
from ldm.data.files import atomic_output, remove_leftovers
from ldm.data.locks import one_writer, open_own
from ldm.data.rendered import RenderedTrain, render, write_shapes3d
from ldm.evaluation.files import write_json
from ldm.evaluation.heatmaps import write_heatmaps
from ldm.util import UserError

ROOMS = (1, 1, 1, 1, 2, 2)
ROOT = Path(__file__).parents[2]


@contextmanager
def no_file_beyond(size: int):
    """Writing more bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, **options)


# ---- whole or not at all


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with no_file_beyond(1000), pytest.raises(UserError) as caught:
        write_json(path, {"a": list(range(10000))})
    assert str(path) in str(caught.value) and "free some space" in str(caught.value)
    assert path.read_bytes() == before and names(tmp_path) == ["scores.json"]


def test_a_disk_that_fills_up_while_rooms_are_rendered(tmp_path):
    """The hint names what helps: the variable only where no path is given."""
    with (
        no_file_beyond(3000),
        pytest.raises(UserError, match=r"rooms-8.* File too large.*leave that out.*ENCDIFF_DATA"),
    ):
        RenderedTrain(tmp_path, sizes=[1, 1, 1, 1, 2, 20], image_size=8)
    assert names(tmp_path / "rendered") == []


def test_heat_maps_on_a_full_disk(tmp_path):
    scores = {"mig": SimpleNamespace(arrays={"mutual_information": np.ones((3, 2))})}
    write_heatmaps(tmp_path, scores, ["a", "b"])
    before = (tmp_path / "mig_mutual_information.png").read_bytes()
    with no_file_beyond(1000), pytest.raises(UserError, match=r"cannot write .*mig_mutual_information\.png: File too"):
        write_heatmaps(tmp_path, scores, ["a", "b"])
    assert names(tmp_path) == ["mig_mutual_information.png"]
    assert (tmp_path / "mig_mutual_information.png").read_bytes() == before


def test_errors_of_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "new"):
        (tmp_path / "none").read_bytes()
    assert names(tmp_path) == []


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    """Not even where its name was guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tokens = iter(["00000000", "00000001"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(tokens))
    (tmp_path / ".new.json.00000000.tmp").symlink_to(victim)
    write_json(tmp_path / "new.json", {})
    assert victim.read_text() == "precious" and (tmp_path / "new.json").read_text() == "{}\n"


# ---- what killed processes leave


def test_leftovers_of_killed_processes_are_removed_and_others_are_not(tmp_path):
    for name in (".rooms-64.h5.1234.tmp", ".other.h5.0123abcd.tmp", ".notes.tmp", ".x.npy.1234.tmp", "x.h5.1234.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".link.h5.1234.tmp").symlink_to(tmp_path / ".notes.tmp")
    with atomic_output(tmp_path / "alive.h5") as alive:
        remove_leftovers(tmp_path / "rooms.h5")
        kept = sorted([".link.h5.1234.tmp", ".notes.tmp", ".x.npy.1234.tmp", "x.h5.1234.tmp", alive.name])
        assert names(tmp_path) == kept
        alive.write_bytes(b"done")
    assert (tmp_path / "alive.h5").read_bytes() == b"done"


def test_leftovers_are_removed_when_data_is_only_read(tmp_path):
    RenderedTrain(tmp_path, sizes=ROOMS, image_size=8)
    (tmp_path / "rendered" / ".rooms-64-10x10x10x8x4x15.h5.1234.tmp").touch()
    RenderedTrain(tmp_path, sizes=ROOMS, image_size=8)
    assert names(tmp_path / "rendered") == ["rooms-8-1x1x1x1x2x2.h5"]


@pytest.mark.slow
def test_a_killed_rendering_leaves_nothing_for_long(tmp_path):
    code = (
        "import sys; from ldm.data.rendered import RenderedTrain;"
        " RenderedTrain(sys.argv[1], [9, 9, 9, 8, 4, 15], image_size=32)"
    )
    killed = start(code, tmp_path)
    folder = tmp_path / "rendered"
    while not any(path.suffix == ".tmp" and path.stat().st_size for path in folder.glob(".*")):
        assert killed.poll() is None, killed.communicate()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [name for name in names(folder) if name.endswith(".tmp")]
    images = RenderedTrain(tmp_path, sizes=ROOMS, image_size=8).images  # of another size
    np.testing.assert_array_equal(images, render(ROOMS, 8))
    assert [name for name in names(folder) if name.endswith(".tmp")] == []


# ---- locks


def test_a_lock_is_beside_the_file_and_gone_afterwards(tmp_path):
    with one_writer(tmp_path / "x"):
        assert names(tmp_path) == [".x.lock"]
    assert names(tmp_path) == []


@pytest.mark.slow
def test_one_process_at_a_time_holds_a_lock(tmp_path):
    """Each reads a counter, waits, and writes the next number."""
    (tmp_path / "counter").write_text("0")
    code = (
        "import sys, time; from pathlib import Path; from ldm.data.locks import one_writer\n"
        "counter = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with one_writer(counter):\n"
        "        n = int(counter.read_text()); time.sleep(0.002); counter.write_text(str(n + 1))\n"
    )
    processes = [start(code, tmp_path / "counter") for _ in range(3)]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert (tmp_path / "counter").read_text() == "60" and names(tmp_path) == ["counter"]


def test_a_lock_that_may_not_be_opened_is_passed_by(tmp_path):
    """Such as a planted link, through which nothing is opened."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".x.lock").symlink_to(victim)
    with one_writer(tmp_path / "x"):
        assert f".x.{os.geteuid()}.lock" in names(tmp_path)
    assert victim.read_text() == "precious" and names(tmp_path) == [".x.lock", "victim"]
    (tmp_path / f".x.{os.geteuid()}.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*x\.lock"), one_writer(tmp_path / "x"):
        pass


def test_only_files_of_the_right_users_are_opened(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"data")
    with open_own(path, [os.geteuid()]) as file:
        assert file.read() == b"data"
    with pytest.raises(UserError, match=f"belongs to user {os.geteuid()}"):
        open_own(path, [os.geteuid() + 1])
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UserError, match="it is a link"):
        open_own(tmp_path / "link", [os.geteuid()])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        open_own(tmp_path / "pipe", [os.geteuid()])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_second_user_reads_what_the_first_has_rendered(tmp_path):
    RenderedTrain(tmp_path, sizes=ROOMS, image_size=8)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_mode & 0o777 == 0o700:  # pytest's
            folder.chmod(0o755)
    # The interpreter may be another user's: everything is imported before this process becomes the second user.
    code = (
        "import os, sys; from ldm.data.rendered import RenderedTrain; from ldm.util import UserError\n"
        f"RenderedTrain(sys.argv[1] + '/own', {list(ROOMS)}, 9)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"print(RenderedTrain(sys.argv[1], {list(ROOMS)}, 8).images.sum())\n"
        f"try: RenderedTrain(sys.argv[1], {list(ROOMS)}, 9)\n"
        "except UserError as error: print(error)\n"
    )
    out, _ = start(code, tmp_path, stderr=subprocess.DEVNULL).communicate(timeout=300)
    total, refused = out.splitlines()
    assert int(total) == render(ROOMS, 8).sum() and refused.startswith("cannot write to the folder")


def test_a_file_can_be_read_while_it_gets_its_name(tmp_path, monkeypatch):
    """HDF5's readers lock files, too."""
    path, replace = tmp_path / "x.h5", os.replace

    def replaced(source, target):
        replace(source, target)
        with h5py.File(target, "r", locking=True) as file:
            assert len(file["images"]) == 4

    monkeypatch.setattr(files.os, "replace", replaced)
    assert write_shapes3d(path, ROOMS, 8, progress=False)
