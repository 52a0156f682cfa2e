"""Render the built-in rooms to OUT/shapes3d/3dshapes.h5, in the layout of the Shapes3D file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.data.rendered import SIZES, write_shapes3d
from ldm.signals import as_command
from ldm.util import UserError


def counts(text: str) -> tuple[int, ...]:
    """Numbers separated by commas."""
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    """Parse, render, report; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    parser.add_argument("--image-size", type=int, default=64, help="width and height in pixels (default: 64)")
    parser.add_argument(
        "--sizes",
        type=counts,
        default=SIZES,
        help="floor, wall and object hues, scales, shapes, orientations (default: 10,10,10,8,4,15)",
    )
    parser.add_argument(
        "--level", action="store_true", help="larger objects, the top edges of all shapes about in one row"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an earlier rendering")
    options = parser.parse_args()
    path = options.out / "shapes3d" / "3dshapes.h5"
    try:
        written = write_shapes3d(path, options.sizes, options.image_size, options.force, level=options.level)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {'rendered' if written else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
