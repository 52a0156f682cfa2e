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
import hashlib
import io
import json
import os
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from soak_formats import FORMATS, ROOT, evaluate

BAD = ("unclear", "traceback", "crash", "hang", "silent")
MEMORY = 8 << 30  # bytes that the reading process may use
START = 300.0  # seconds that it may take to start


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


def _kind(path: Path) -> str:
    return "picture" if path.suffix in (".png", ".jpg") else path.suffix


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
        examples = [valid / other / "files" / (valid / other / "target").read_text() for other in names]
        strange = [path for path in examples if _kind(path) != _kind(target)]  # another picture would be a right one
        target.write_bytes(strange[int(rng.integers(len(strange)))].read_bytes())
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
    text = json.dumps(structure)
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    return {"kind": "read", "text": text, "structure": text, "values": hashlib.sha256(data).hexdigest()}


def serve(cases: Path, start: int) -> None:
    """The other process: a line of JSON when it is ready, and one per case."""
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    import ldm.cli.early
    import ldm.data.dis

    assert ldm.data.dis.Shapes3D is not None and ldm.cli.early.TRAINER
    evaluate()
    print("ready", file=answers, flush=True)
    for folder, name in json.loads(cases.read_text())[start:]:
        print(json.dumps(read_case(Path(folder), name)), file=answers, flush=True)


def _lines(process: subprocess.Popen, limit: float) -> Iterator[bytes | None]:
    """Lines of a process; None when one takes longer than `limit` in seconds, the first excepted."""
    assert process.stdout is not None
    buffered, descriptor, deadline = b"", process.stdout.fileno(), time.monotonic() + max(limit, START)
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
        deadline = time.monotonic() + limit


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
            started, hanging = False, False
            for line in _lines(process, limit):
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
