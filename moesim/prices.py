"""What machines cost: dated prices from a file that anyone may edit, the one that comes with moesim or one's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

from moesim.efficiencies import read_table
from moesim.errors import MachineError

COLUMNS = ("machine", "usd_per_hour", "usd_per_hour_low", "purchase_usd", "years", "date", "source")
HOURS_PER_YEAR = 8760
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Prices:
    """US dollars per hour and GPU; None where no source was found. date: when the price was read."""

    usd_per_hour: float | None = None
    usd_per_hour_low: float | None = None
    source: str = ""
    date: str = ""

    @property
    def known(self) -> float | None:
        """The usual price, else the lowest seen."""
        return self.usd_per_hour or self.usd_per_hour_low


NO_PRICES = Prices()


@cache
def shipped_prices() -> dict[str, Prices]:
    """The prices that come with moesim, by machine."""
    return _prices("moesim/data/prices.csv", read_table("prices"))


def read_prices(path: Path) -> dict[str, Prices]:
    """Prices of a CSV by machine, each of one GPU (a name such as 8xh200-sxm: of all of them together).

    A row has usd_per_hour, or purchase_usd and the years it is spread over, every hour of them alike; and the date.
    Raises MachineError by file, line, value and rule.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MachineError(f"{path}: larger than {MAX_BYTES} bytes; prices are a line per machine")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"machine", "date"} - set(reader.fieldnames or ())
            if missing:
                raise MachineError(f"{path}: column '{min(missing)}' is missing; a price file has {', '.join(COLUMNS)}")
            return _prices(str(path), reader)
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MachineError(f"{path}: not a CSV text file ({error})") from None


def _prices(where: str, rows: Iterable[dict[str, str]]) -> dict[str, Prices]:
    found: dict[str, Prices] = {}
    for line, row in enumerate(rows, start=2):
        at = f"{where}, line {line}"
        name = (row["machine"] or "").strip()
        if not name or name in found:
            raise MachineError(f"{at}: machine '{name}' must be a name that no other line has")
        hourly, low, purchase, years = (_dollars(at, column, row.get(column)) for column in COLUMNS[1:5])
        if (purchase is None) != (years is None) or (purchase is not None and hourly is not None):
            raise MachineError(f"{at}: give usd_per_hour, or purchase_usd and years, not parts of both")
        if purchase is not None and years is not None:
            hourly = purchase / (years * HOURS_PER_YEAR)
        if hourly is None and low is None:
            raise MachineError(f"{at}: no price of {name}; give usd_per_hour, or purchase_usd and years")
        day = (row["date"] or "").strip()
        try:
            date.fromisoformat(day)
        except ValueError:
            raise MachineError(f"{at}: date '{day}' must be a day such as 2026-11-21: prices age") from None
        gpus = int(name.partition("x")[0]) if name.partition("x")[0].isdigit() else 1
        each = [price and price / max(gpus, 1) for price in (hourly, low)]
        found[name] = Prices(each[0], each[1], (row.get("source") or "").strip() or Path(where).name, day)
    return found


def _dollars(at: str, column: str, text: str | None) -> float | None:
    if not (text or "").strip():
        return None
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 < value < 1e12:
        raise MachineError(f"{at}: {column} '{text}' must be a number above 0")
    return value
