"""`moesim calibrate`: measure this machine and write a profile of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.calibrate import options

DeviceOption = Annotated[str | None, typer.Option("--device", help=options.DEVICE)]
BudgetOption = Annotated[str, typer.Option("--budget", help=options.BUDGET)]
OnlyOption = Annotated[str | None, typer.Option("--only", help=options.ONLY)]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help=options.OUTPUT)]
SeedOption = Annotated[int, typer.Option("--seed", help=options.SEED)]
FitOnly = Annotated[bool, typer.Option("--fit-only", help=options.FIT_ONLY)]
JsonOption = Annotated[bool, typer.Option("--json", help=options.JSON)]


def calibrate(
    device: DeviceOption = None,
    budget: BudgetOption = options.DEFAULT_BUDGET,
    only: OnlyOption = None,
    output: OutputOption = None,
    seed: SeedOption = 0,
    fit_only: FitOnly = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine and write a profile of it. (Comparing predictions with real runs is `validate`.)

    A second run with the same -o goes on where the first ended; Ctrl-C keeps what was measured.
    """
    from moesim.calibrate.run import calibrate as measure_and_fit

    code = measure_and_fit(device, budget, only, output, seed, fit_only, as_json)
    if code:
        raise SystemExit(code)
