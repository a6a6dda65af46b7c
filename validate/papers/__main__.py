"""`python -m validate.papers`: what `moesim validate papers` does."""

from __future__ import annotations

import sys

from moesim.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["validate", "papers"]
    main()
