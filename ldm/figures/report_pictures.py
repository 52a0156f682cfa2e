"""The pictures of a run, for its report: embedded, so that the page is one file."""

import base64
import re
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.evaluation.runs import figures_of

LARGEST = 8 * 2**20  # bytes of a picture that is embedded
KINDS = {"PNG": "image/png", "GIF": "image/gif"}
OLD = re.compile(r"(.+)_gs-(\d+)_e-\d+")  # of the callback `image_logger`
# Name -> title, and what it shows.
TITLES = {
    "reconstructions": ("Reconstructions", "Images, what the first stage makes of them, and what EncDiff draws"),
    "swaps": ("Swapped concepts", "Each row takes the concepts of one factor from the source image"),
    "traversals": ("Traversals", "Each row changes one scalar from its low to its high values"),
    "attention": ("Attention", "Where the U-Net's cross attention looks for each concept"),
    "interpolation": ("Interpolation", "From one image to another by their scalars"),
    "denoising": ("Denoising", "From noise to images"),
    "bottleneck": ("Information bottleneck", "The KL divergence of Eq. 5 over time steps, for each noise schedule"),
    "inputs": ("Inputs", "Images of the set"),
    "first_stage_reconstruction": ("First stage", "What the first stage makes of the images"),
    "encdiff_reconstruction": ("EncDiff", "Drawn from the tokens of the images"),
    "denoise_row": ("Denoising", "From noise to images"),
    "progressive_row": ("Predicted images", "What the model predicts on the way from noise to images"),
    "diffusion_row": ("Diffusion", "From images to noise"),
    "swap": ("Swapped concepts", "First row: images; in each row below, one token comes from the first image"),
}
# Pictures that the page has as tables.
TABLES = ("matrices",)
ORDER = (
    *("reconstructions", "inputs", "first_stage_reconstruction", "encdiff_reconstruction"),
    *("swaps", "swap", "traversals", "attention"),
)


def pictures_of(logdir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures of a run, of each name the newest, else the older pictures of its last step.

    Returns:
        For each: name, title, caption, `src` (a data URI), `width` and `height` to show it at, `pixels` (it is
        small), `wide`, `moves`; and what is wrong with others.
    """
    found, notes = [], []
    for path, name, origin in _files(logdir):
        where = path.relative_to(logdir).as_posix()
        try:
            found.append(_embedded(path, name, origin))
        except ValueError as error:
            notes.append(f"{where} is not shown: {error}")
        except Exception:  # Pillow raises many kinds for damaged files
            notes.append(f"{where} is damaged, and not shown")
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(found, key=lambda p: (places.get(p["name"], len(places)), p["name"], p["moves"])), notes


def _files(logdir: Path) -> list[tuple[Path, str, str]]:
    """Files with their names, and where they come from, in words."""
    own = [(path, name) for name, paths in figures_of(logdir).items() if name not in TABLES for path in paths]
    if own:
        return [(path, name, _step(path.parent.name)) for path, name in own]
    old = [(path, OLD.fullmatch(path.stem)) for path in sorted((logdir / "images" / "train").glob("*_gs-*.png"))]
    steps = [int(match[2]) for _, match in old if match]
    return [(path, match[1], _step(match[2])) for path, match in old if match and int(match[2]) == max(steps)]


def _step(text: str) -> str:
    """`step 4,000`, of a folder's name or a part of a file's; empty where that is no number."""
    return f"step {int(text):,}" if text.isdecimal() else ""


def _embedded(path: Path, name: str, origin: str) -> dict[str, Any]:
    """One picture.

    Raises:
        ValueError: it is too large, or of another kind.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size / 2**20:.0f} MiB")
    data = path.read_bytes()
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        kind, (width, height) = KINDS.get(picture.format or ""), picture.size
        picture.load()
    if kind is None:
        raise ValueError("it is neither PNG nor GIF")
    title, caption = TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
    scale = 3 if max(width, height) <= 200 else 2 if max(width, height) <= 400 else 1
    caption = f"{caption}{', ' if caption and origin else ''}{origin}"
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {
        "name": name,
        "title": title,
        "caption": caption,
        "src": source,
        "width": width * scale,
        "height": height * scale,
        "pixels": scale > 1,
        "wide": width > 2 * height,
        "moves": kind == KINDS["GIF"],
    }
