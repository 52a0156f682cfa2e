"""Damaged data files: each must give an error of one line, or what the undamaged file gives.

  python scripts/soak_files.py --count 600 --seed 0

A valid file of every format that is read (checkpoints aside) is written, copies of it are damaged, and each copy is
read in another process, within a time limit. What became of them is counted:

  right      the same images, factors, scores or configuration as from the undamaged file
  error      a mistake of the user's, in one line that names the file or the key
  raw        other pixels or numbers, in a format that has no checksums for them
  text       another valid text
  unclear, traceback, crash, hang, silent: must not happen
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import runpy
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
BAD = ("unclear", "traceback", "crash", "hang", "silent")
SIZES = (2, 2, 1, 2, 1, 3)  # of the small Shapes3D
ROWS = 24
MEMORY = 8 << 30


@dataclass(frozen=True)
class Format:
    """A kind of input.

    Args:
        write: writes a valid one into a folder; returns what is to be damaged.
        read: reads it from the folder; gives its structure, and its values.
        without: what of it has no checksums: "values", "text" (all of it), or nothing.
        others: write something readable in its place that is not what is expected.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], tuple[Any, Any]]
    without: str = ""
    others: tuple[Callable[[Path], None], ...] = ()


# --- What is written


def pixels(count: int = ROWS, size: int = 8) -> np.ndarray:
    """Random images (count, size, size, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def labels() -> np.ndarray:
    """Values (24, 6) of the small grid of Shapes3D."""
    axes = [np.arange(size) / size for size in SIZES]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(SIZES))


def write_h5(path: Path, images: np.ndarray | None = None, **options: Any) -> Path:
    """The layout of `3dshapes.h5`."""
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=pixels() if images is None else images, **options)
        file.create_dataset("labels", data=labels())
    return path


def write_rooms(folder: Path) -> Path:
    """Rooms that are rendered here."""
    from ldm.data.rendered import write_shapes3d

    write_shapes3d(folder / "3dshapes.h5", SIZES, 8, progress=False)
    return folder / "3dshapes.h5"


def write_npz(path: Path, images: np.ndarray, packed: bool = True) -> Path:
    """The layout of `mpi3d_toy.npz`."""
    with path.open("wb") as file:
        (np.savez_compressed if packed else np.savez)(file, images=images)
    return path


def write_cars(folder: Path, packed: bool = True) -> Path:
    """Two cars; the second is damaged."""
    import scipy.io

    (folder / "cars").mkdir()
    for car in range(2):
        mesh = np.random.default_rng(car).integers(0, 256, (8, 8, 3, 4, 3), dtype=np.uint8)
        scipy.io.savemat(folder / "cars" / f"car_{car}.mat", {"im": mesh}, do_compression=packed)
    return folder / "cars" / "car_1.mat"


def picture(mode: str, size: tuple[int, int] = (20, 16)) -> Any:
    """A picture of noise."""
    from PIL import Image

    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise).convert(mode) if mode != "LA" else Image.fromarray(noise[..., :2].copy(), "LA")


def write_pictures(suffix: str, mode: str) -> Callable[[Path], Path]:
    """A folder of three pictures; the second is damaged."""

    def write(folder: Path) -> Path:
        (folder / "pictures").mkdir()
        for name in ("a", "b", "c"):
            picture(mode).save(folder / "pictures" / f"{name}{suffix}")
        return folder / "pictures" / f"b{suffix}"

    return write


def attribute_table(folder: Path) -> Path:
    """CelebA's pictures, and its table, which is returned."""
    (folder / "img_align_celeba").mkdir()
    lines = ["3", "Bald Smiling Young"]
    for k in range(3):
        picture("RGB", (16, 16)).save(folder / "img_align_celeba" / f"{k:06d}.jpg")
        lines.append(f"{k:06d}.jpg {' '.join(str(2 * (k >> n & 1) - 1) for n in range(3))}")
    table = folder / "list_attr_celeba.txt"
    table.write_text("\n".join(lines) + "\n")
    return table


def write_lmdb(folder: Path) -> Path:
    """An LMDB of PNG pictures."""
    import lmdb

    with lmdb.open(str(folder / "faces.lmdb"), map_size=1 << 22) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(60):
                data = io.BytesIO()
                picture("RGB", (16 + k % 8 * 4,) * 2).save(data, "png")
                transaction.put(f"None-{k:07d}".encode(), data.getvalue())
            transaction.put(b"length", b"60")
    (folder / "faces.lmdb" / "lock.mdb").unlink()
    return folder / "faces.lmdb" / "data.mdb"


def write_cache(folder: Path, checksums: bool = True) -> Path:
    """Images that were converted, here or by an earlier version, which wrote no checksums."""
    from ldm.data.checksums import read_checksums

    write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3))
    read_shapes(folder)
    (path,) = folder.glob("*.npy")
    if not checksums:
        with path.open("r+b") as file:
            found = read_checksums(file)
            file.truncate(found.size if found else None)
    return path


def rewrite_cache(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Write another array in the place of a converted one."""

    def write(path: Path) -> None:
        with path.open("r+b") as file:
            images = change(np.load(file))
        with path.open("wb") as file:
            np.save(file, images)

    return write


def codes() -> np.ndarray:
    """Codes (120, 4) of a grid of 4 × 5 × 6."""
    rng = np.random.default_rng(0)
    factors = np.stack(np.unravel_index(np.arange(120), (4, 5, 6)), 1)
    return np.concatenate([factors + rng.normal(0, 0.1, (120, 3)), rng.normal(size=(120, 1))], 1).astype(np.float32)


def write_own_codes(folder: Path) -> Path:
    """Codes that `scripts/evaluate.py` has saved."""
    from ldm.evaluation.files import write_codes

    write_codes(folder / "codes.npy", codes())
    return folder / "codes.npy"


def save(path: Path, array: np.ndarray) -> Path:
    """`np.save` under exactly this name."""
    with path.open("wb") as file:
        np.save(file, array)
    return path


def write_factors(folder: Path) -> Path:
    """Codes, and the table of their factors, which is returned."""
    save(folder / "codes.npy", codes())
    rows = [f"{a},{b * 0.5},kind {c}" for a in range(4) for b in range(5) for c in range(6)]
    (folder / "factors.csv").write_text("\n".join(["angle,size,kind", *rows]) + "\n")
    return folder / "factors.csv"


def write_yaml(folder: Path) -> Path:
    """A configuration."""
    return Path(shutil.copy(ROOT / "configs" / "quickstart" / "first_stage.yaml", folder / "mine.yaml"))


# --- How it is read


def of_dataset(dataset: Any) -> tuple[Any, Any]:
    """Structure and values of a data set."""
    grid, attributes = dataset.grid, getattr(dataset, "attributes", None)
    table = None if attributes is None else [dataset.attribute_names, attributes.tolist()]
    structure = [dataset.images.shape, str(dataset.images.dtype), grid and [grid.sizes, grid.names], table]
    return structure, dataset.images.tobytes()


def read_shapes(folder: Path) -> tuple[Any, Any]:
    """A small `3dshapes.h5`, with the labels' grid."""
    from ldm.data.dis import Shapes3DTrain

    return of_dataset(Shapes3DTrain(folder / "3dshapes.h5"))


def reader(name: str, where: str, **params: Any) -> Callable[[Path], tuple[Any, Any]]:
    """Reads a data set of `ldm.data.dis`."""

    def read(folder: Path) -> tuple[Any, Any]:
        from ldm.data import dis

        return of_dataset(getattr(dis, name)(path=folder / where, **params))

    return read


@functools.cache
def evaluate() -> Callable[[list[str]], int]:
    """`main` of `scripts/evaluate.py`."""
    return runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]


def scored(*arguments: str) -> Callable[[Path], tuple[Any, Any]]:
    """Runs `scripts/evaluate.py` on the folder's files."""

    def read(folder: Path) -> tuple[Any, Any]:
        given = [str(folder / text) if "." in text else text for text in arguments]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = evaluate()([*given, "--metrics", "mig", "--out", str(folder / "out")])
        if status:
            raise ValueError(errors.getvalue().strip())
        record = json.loads((folder / "out" / "scores.json").read_text())
        return [record["shape"], record["factors"]], record["matrices"]

    return read


def read_yaml(folder: Path) -> tuple[Any, Any]:
    """Composes a configuration, and checks its names, as `main.py` does before it builds anything."""
    from omegaconf import OmegaConf

    from ldm.cli.configure import compose
    from ldm.cli.early import check_names

    config: Any = OmegaConf.to_container(compose([folder / "mine.yaml"]), resolve=True)
    check_names(config, resumed=False)
    return config, None


def npz_others(name: str) -> tuple[Callable[[Path], None], ...]:
    """Arrays of another kind, shape or order in an `.npz`."""
    arrays = (
        lambda: pixels().astype(np.int64),
        lambda: np.asfortranarray(pixels()),
        lambda: pixels()[..., 0],
        lambda: pixels(ROWS - 1),
        lambda: np.array([{}], dtype=object),
    )
    return tuple(lambda path, array=array: np.savez(path.open("wb"), **{name: array()}) for array in arrays)


SHAPES = (
    lambda path: write_h5(path, pixels().astype(np.float32)),
    lambda path: write_h5(path, pixels()[..., :2]),
    lambda path: write_h5(path, pixels(ROWS - 1)),
)
CODES = ("--codes", "codes.npy", "--grid", "4,5,6")
CODE_ARRAYS: tuple[Callable[[Path], Any], ...] = (
    lambda path: save(path, codes().astype(complex)),
    lambda path: save(path, codes()[:-1]),
    lambda path: save(path, np.float32(3)),
    lambda path: save(path, np.array(["a"] * 120)),
    lambda path: save(path, np.full((120, 4), np.nan)),
    lambda path: save(path, np.zeros((120, 0))),
)
CACHES = tuple(
    rewrite_cache(change)
    for change in (np.asfortranarray, lambda x: x.astype(np.int8), lambda x: x[:-1], lambda x: x.reshape(-1))
)
MPI = {"factor_sizes": [2, 2, 2, 3, 1, 1, 1]}
FORMATS: dict[str, Format] = {
    "h5 packed": Format(
        lambda folder: write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3), compression="gzip"),
        read_shapes,
        "",
        SHAPES,
    ),
    "h5 chunked": Format(lambda folder: write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3)), read_shapes, "values"),
    "h5 in one piece": Format(lambda folder: write_h5(folder / "3dshapes.h5"), read_shapes, "values", SHAPES),
    "rooms": Format(write_rooms, read_shapes, "", SHAPES),
    "npz packed": Format(
        lambda folder: write_npz(folder / "mpi.npz", pixels()),
        reader("MPI3D", "mpi.npz", **MPI),
        "",
        npz_others("images"),
    ),
    "npz stored": Format(
        lambda folder: write_npz(folder / "mpi.npz", pixels(), packed=False),
        reader("MPI3D", "mpi.npz", **MPI),
        "values",
    ),
    "mat packed": Format(write_cars, reader("Cars3D", "cars", image_size=8, factor_sizes=[3, 4, 2])),
    "mat": Format(
        lambda folder: write_cars(folder, packed=False),
        reader("Cars3D", "cars", image_size=8, factor_sizes=[3, 4, 2]),
        "values",
    ),
    **{
        f"png {mode}": Format(write_pictures(".png", mode), reader("ImageFolder", "pictures", image_size=8))
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
    },
    **{
        f"jpeg {mode}": Format(write_pictures(".jpg", mode), reader("ImageFolder", "pictures", image_size=8), "values")
        for mode in ("RGB", "L", "CMYK")
    },
    "attributes": Format(attribute_table, reader("CelebA", "img_align_celeba", image_size=8), "text"),
    "lmdb": Format(write_lmdb, reader("CelebA", "faces.lmdb", image_size=8)),
    "cache": Format(write_cache, read_shapes, "", CACHES),
    "cache of before": Format(lambda folder: write_cache(folder, checksums=False), read_shapes, "values"),
    "own codes": Format(write_own_codes, scored(*CODES), "", CODE_ARRAYS),
    "codes": Format(lambda folder: save(folder / "codes.npy", codes()), scored(*CODES), "values"),
    "codes npz": Format(
        lambda folder: write_npz(folder / "codes.npz", codes()), scored("--codes", "codes.npz", "--grid", "4,5,6")
    ),
    "factors": Format(write_factors, scored("--codes", "codes.npy", "--factors", "factors.csv"), "text"),
    "yaml": Format(write_yaml, read_yaml, "text"),
}


# --- How it is damaged


def _flip(data: np.ndarray, rng: np.random.Generator, low: int, high: int) -> bytes:
    for place in rng.integers(low, max(high, low + 1), rng.integers(1, 4)):
        data[min(place, len(data) - 1)] ^= 1 << rng.integers(8)
    return data.tobytes()


def _block(rng: np.random.Generator, size: int) -> tuple[int, int]:
    start = int(rng.integers(size))
    return start, min(start + int(2 ** rng.integers(1, 12)), size)


def _zeroed(data: np.ndarray, rng: np.random.Generator) -> bytes:
    start, end = _block(rng, len(data))
    data[start:end] = 0
    return data.tobytes()


def _swapped(data: np.ndarray, rng: np.random.Generator) -> bytes:
    first, end = _block(rng, len(data))
    second = int(rng.integers(len(data) - (end - first) + 1))
    part = data[first:end].copy()
    data[first:end] = data[second : second + end - first]
    data[second : second + end - first] = part
    return data.tobytes()


DAMAGES: dict[str, Callable[[np.ndarray, np.random.Generator], bytes]] = {
    "bits": lambda data, rng: _flip(data, rng, 0, len(data)),
    "bits of the beginning": lambda data, rng: _flip(data, rng, 0, min(300, len(data))),
    "bits of the end": lambda data, rng: _flip(data, rng, max(0, len(data) - 200), len(data)),
    "truncated": lambda data, rng: data[: rng.integers(len(data))].tobytes(),
    "last bytes missing": lambda data, rng: data[: -int(rng.integers(1, 40))].tobytes(),
    "zeroed block": _zeroed,
    "swapped blocks": _swapped,
    "block twice": lambda data, rng: data[: (end := _block(rng, len(data))[1])].tobytes() + data[end // 2 :].tobytes(),
    "bytes behind it": lambda data, rng: data.tobytes() + rng.bytes(int(rng.integers(1, 100))),
    "noise": lambda data, rng: rng.bytes(len(data)),
    "empty": lambda data, rng: b"",
}


def damage(valid: Path, names: Sequence[str], number: int, seed: int, folder: Path) -> tuple[str, str]:
    """Copy an example into `folder`, and damage the copy.

    Args:
        valid: the folder of undamaged examples.
        names: of `FORMATS`; the example is the one of this number.
        number: of the case. seed: with it, decides everything.
        folder: to be made.

    Returns:
        The names of format and damage.
    """
    rng = np.random.default_rng([seed, number])
    name = names[number % len(names)]
    source = valid / name
    shutil.copytree(source / "files", folder, copy_function=shutil.copy2)
    target = folder / (source / "target").read_text()
    status, others = target.stat(), FORMATS[name].others
    kinds = [*DAMAGES, "folder", "another format", *["another array"] * min(len(others), 3)]
    kind = kinds[rng.integers(len(kinds))]
    if kind == "another array":
        others[rng.integers(len(others))](target)
    elif kind == "folder":
        target.unlink()
        target.mkdir()
    elif kind == "another format":
        other = valid / names[rng.integers(len(names))]
        target.write_bytes((other / "files" / (other / "target").read_text()).read_bytes())
    else:
        target.write_bytes(DAMAGES[kind](np.fromfile(target, np.uint8), rng))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    return name, kind


# --- Reading in another process


def read_case(folder: Path, name: str) -> dict[str, str]:
    """What reading gives, in this process: structure and values (as hashes), or an error and its kind."""
    target = json.dumps(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            structure, values = FORMATS[name].read(folder)
    except ValueError as error:  # UserError is one
        text = str(error)
        named = any(path.name in text for path in folder.rglob("*")) or name in ("yaml", "factors") or "codes" in name
        clear = type(error).__name__ == "UserError" or text.startswith("error: ")
        kind = "traceback" if not clear else "error" if named and "\n" not in text and text.strip() else "unclear"
        return {"kind": kind, "text": text if kind == "error" else f"{target}: {traceback.format_exc()}"}
    except Exception:
        return {"kind": "traceback", "text": traceback.format_exc()}
    found = {"structure": json.dumps(structure), "values": values if isinstance(values, bytes) else json.dumps(values)}
    hashed = {key: hashlib.sha256(text if isinstance(text, bytes) else text.encode()) for key, text in found.items()}
    return {"kind": "read", "text": found["structure"]} | {key: digest.hexdigest() for key, digest in hashed.items()}


def serve(cases: Path, start: int) -> None:
    """The other process: a line of JSON when it is ready, and one per case."""
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    import ldm.cli.early
    import ldm.data.dis

    assert ldm.data.dis and ldm.cli.early and evaluate()
    print("ready", file=answers, flush=True)
    for folder, name in json.loads(cases.read_text())[start:]:
        print(json.dumps(read_case(Path(folder), name)), file=answers, flush=True)


def _lines(process: subprocess.Popen, limits: Iterator[float]) -> Iterator[bytes | None]:
    """Lines of a process; None when one takes longer than its limit in seconds."""
    assert process.stdout is not None
    buffered, descriptor, deadline = b"", process.stdout.fileno(), time.monotonic() + next(limits)
    while True:
        while b"\n" not in buffered:
            ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                yield None
                return
            data = os.read(descriptor, 1 << 16)
            if not data:
                return
            buffered += data
        line, _, buffered = buffered.partition(b"\n")
        yield line
        deadline = time.monotonic() + next(limits)


def read_all(cases: Sequence[tuple[str, str]], work: Path, limit: float) -> list[dict[str, str]]:
    """Read cases (folder, name of the format), in as many processes after one another as survive it.

    Args:
        cases: what to read.
        work: folder for what the processes need.
        limit: seconds for a case, before it counts as a hang.

    Returns:
        What `read_case` gives for each, or the kinds `crash` and `hang`.
    """
    file, log = work / "cases.json", work / "stderr.txt"
    file.write_text(json.dumps(list(cases)))
    results: list[dict[str, str]] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    environment.pop("ENCDIFF_CACHE", None)
    while len(results) < len(cases):
        command = [sys.executable, __file__, "--serve", str(file), str(len(results))]
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=ROOT) as process,
        ):
            lines = _lines(process, iter(lambda first=[300.0]: first.pop() if first else limit, None))
            started, hanging = False, False
            for line in lines:
                hanging = line is None
                if line is not None and started:
                    results.append(json.loads(line))
                started = True
                if hanging or len(results) == len(cases):
                    break
            process.kill()
        if not started:
            raise RuntimeError(f"the reading process does not start: {log.read_text()}")
        if len(results) < len(cases):
            results.append({"kind": "hang" if hanging else "crash", "text": log.read_text()[-2000:]})
    return results


def outcome(found: dict[str, str], expected: dict[str, str], without: str) -> str:
    """What became of a damaged file; see the module."""
    if found["kind"] != "read":
        return found["kind"]
    same = [found[key] == expected[key] for key in ("structure", "values")]
    if all(same):
        return "right"
    if without == "text":
        return "text"
    return "raw" if without == "values" and same[0] else "silent"


def soak(count: int, seed: int, work: Path, limit: float = 60.0) -> list[dict[str, str]]:
    """Damage and read `count` files.

    Args:
        count: how many. seed: decides which, and how they are damaged.
        work: an empty folder.
        limit: seconds for one file.

    Returns:
        For each: `number`, `format`, `damage`, `outcome` and `text`, the error or what was read.

    Raises:
        RuntimeError: an undamaged file cannot be read.
    """
    valid, names = work / "valid", list(FORMATS)
    for name in names:
        (valid / name / "files").mkdir(parents=True)
        target = FORMATS[name].write(valid / name / "files")
        (valid / name / "target").write_text(str(target.relative_to(valid / name / "files")))
        shutil.copytree(valid / name / "files", work / "read" / name, copy_function=shutil.copy2)
    cases = [(str(work / "read" / name), name) for name in names]
    kinds = []
    for number in range(count):
        folder = work / "damaged" / str(number)
        kinds.append(damage(valid, names, number, seed, folder))
        cases.append((str(folder), kinds[-1][0]))
    results = read_all(cases, work, limit)
    expected = dict(zip(names, results, strict=False))
    for name, found in expected.items():
        if found["kind"] != "read":
            raise RuntimeError(f"'{name}' is not read although it is valid: {found['text']}")
    rows = []
    for number, ((name, kind), found) in enumerate(zip(kinds, results[len(names) :], strict=True)):
        what = outcome(found, expected[name], FORMATS[name].without)
        rows.append({"number": str(number), "format": name, "damage": kind, "outcome": what, "text": found["text"]})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Soak and report; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="damaged files (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="decides how they are damaged (default: 0)")
    parser.add_argument("--keep", type=Path, help="an empty folder in which the files stay")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]))
        return 0
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        work = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = soak(options.count, options.seed, work)
    for row in rows:
        if row["outcome"] in BAD:
            print("{number} {format}, {damage}: {outcome}\n{text}\n".format(**row))
    counts = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} damaged files, seed {options.seed}, {time.monotonic() - start:.0f} s")
    for what, number in counts.most_common():
        kinds = Counter(row["format"] for row in rows if row["outcome"] == what)
        print(f"{what:<10}{number:>5}  {', '.join(f'{name} {n}' for name, n in kinds.most_common())}")
    return 1 if any(counts[kind] for kind in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
