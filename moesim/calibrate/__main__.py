"""`python -m moesim.calibrate`: the command alone, with the standard library's argument parser.

A machine with a GPU to measure may have torch and little else; this needs numpy, scipy, pyarrow and pyyaml besides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moesim.calibrate import options
from moesim.calibrate.run import INTERRUPTED, calibrate
from moesim.errors import MoesimError


def main() -> int:
    """Parse, run, and print an error in one line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moesim.calibrate", description=options.ABOUT)
    parser.add_argument("--device", help=options.DEVICE)
    parser.add_argument("--budget", default=options.DEFAULT_BUDGET, help=options.BUDGET)
    parser.add_argument("--only", help=options.ONLY)
    parser.add_argument("-o", "--output", type=Path, help=options.OUTPUT)
    parser.add_argument("--seed", type=int, default=0, help=options.SEED)
    parser.add_argument("--fit-only", action="store_true", help=options.FIT_ONLY)
    parser.add_argument("--json", action="store_true", help=options.JSON)
    given = parser.parse_args()
    try:
        return calibrate(given.device, given.budget, given.only, given.output, given.seed, given.fit_only, given.json)
    except MoesimError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:  # before the first point or while fitting
        sys.stderr.write("error: interrupted; what was measured is kept\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
