"""Progress bars: see `ldm.bars`."""

from ldm.bars import bar

__all__ = ["bar"]
