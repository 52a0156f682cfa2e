"""Write report.html: what runs trained, their scores, losses, matrices, pictures and configurations, as one page.

python scripts/report.py logs/<run>                        # into the log directory
python scripts/report.py logs/<run> logs/<another>         # side by side, into ./report.html
python scripts/report.py logs/study --out study.html       # all runs under a folder
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.evaluation.runs import logdirs
from ldm.figures.report import NAME, write_report
from ldm.signals import as_command
from ldm.util import UserError


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="log directories, or folders of them")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {NAME} in the only path, or else here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, and print where."""
    opt = arguments(argv)
    found = logdirs(opt.paths)
    if not found:
        raise UserError(f"there are no runs in {', '.join(map(str, opt.paths))}: give log directories")
    out = opt.out or (opt.paths[0] / NAME if len(opt.paths) == 1 else Path(NAME))
    if out.is_dir():
        raise UserError(f"'{out}' is a folder: name a file", "--out")
    write_report(found, out)
    print(out)


if __name__ == "__main__":
    try:
        sys.exit(as_command(main))
    except UserError as error:
        sys.exit(f"error: {error}")
