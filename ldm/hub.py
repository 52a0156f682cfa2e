"""Models that others share: a folder that `scripts/export.py` wrote, here or on the Hugging Face Hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError

SCHEME = "hf://"
WEIGHTS, CONFIG, CONCEPTS = "model.safetensors", "model.yaml", "concepts.json"
FORM = "expected hf://user/name, or hf://user/name@revision"


def located(path: str | Path) -> Path:
    """Where a model is: its weights in an exported folder, downloaded first if need be; any other path as it is.

    Args:
        path: a path, or `hf://user/name` or `hf://user/name@revision` (branch, tag or commit). Of the latter, weights,
            configuration and names of concepts are downloaded into the hub's cache, and nothing else.

    Raises:
        UserError: an address of another form, no `huggingface-hub`, nothing there, or not an exported model.
    """
    address = re.sub(r"^hf:/+", SCHEME, str(path))  # a `Path` holds one slash in place of two
    if address.startswith(SCHEME):
        return _downloaded(address) / WEIGHTS
    path = Path(path)
    exported = path.is_dir() and (path / WEIGHTS).is_file() and not (path / "configs").is_dir()
    return path / WEIGHTS if exported else path


def _downloaded(address: str) -> Path:
    """The folder of the hub's cache that holds a model."""
    name, sign, revision = address.removeprefix(SCHEME).partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or bool(sign) != bool(revision):
        raise UserError(f"{FORM}, got '{address}'")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"'{address}' needs huggingface-hub: pip install 'encdiff[hub]'") from error
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG, CONCEPTS]))
    except Exception as error:  # of many kinds: no network, no such model, not allowed, a name of another form
        reason = " ".join(str(error).split()).rstrip(".")  # a sentence follows
        told = f"'{address}' is not in the hub's cache, and cannot be downloaded: {type(error).__name__}: {reason}"
        raise UserError(f"{told}. Without a network, copy the folder and give its path") from error
    absent = [part for part in (WEIGHTS, CONFIG) if not (folder / part).is_file()]
    if absent:
        raise UserError(f"'{address}' is not a model that scripts/export.py wrote: it has no {' and no '.join(absent)}")
    return folder


def read_concepts(folder: Path) -> dict[str, Any] | None:
    """What an exported folder says of its concepts, by the names of the fields of `Concepts`; None without the file.

    Raises:
        UserError: it holds anything else.
    """
    path = folder / CONCEPTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tokens = {str(name): tuple(map(_number, numbers)) for name, numbers in found["tokens"].items()}
        share = {str(name): float(found["share"][name]) for name in tokens}
        low, high = (tuple(map(float, found[end])) for end in ("low", "high"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged: {type(error).__name__}: {error}") from error
    if not all(tokens.values()) or len(low) != len(high):
        raise UserError(f"'{path}' is damaged: expected concepts for every factor, and as many low values as high ones")
    return {"tokens": tokens, "share": share, "low": low, "high": high}


def concepts_text(concepts: Any) -> str:
    """What `read_concepts` reads, of a `Concepts`."""
    fields: Mapping[str, Any] = {name: getattr(concepts, name) for name in ("tokens", "share", "low", "high")}
    return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not the number of a concept")
    return value
