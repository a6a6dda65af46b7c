"""A sweep's results: one Parquet data set, a directory of part files, each written whole and never changed."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import SweepError
from moesim.files import atomic
from moesim.machine import Machine
from moesim.output import to_json
from moesim.plan.jobs import Job
from moesim.plan.spec import ASKED

if TYPE_CHECKING:
    import pyarrow as pa

REFUSED, FAILED = "REFUSED", "FAILED"  # the question made no sense; the run broke
LOCK = ".lock"
METRICS = (
    "completed", "duration_s", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput",
    "total_token_throughput",
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
      for kind in ("mean", "median", "std", "p50", "p90", "p95", "p99")),
    "lookups", "hits", "lates", "misses", "hit_rate", "late_rate", "miss_rate", "evictions", "host_experts",
    "h2d_bytes", "d2h_bytes", "nvme_bytes", "prefetch_bytes", "prefetch_useful_bytes", "prefetch_wasted_bytes",
    "prefetch_precision", "h2d_bytes_per_token", "stall_ms_per_token",
    *(f"{kind}_num_requests_{what}" for what in ("waiting", "running") for kind in ("mean", "max")),
    "usd_per_million_output_tokens", "usd_per_million_tokens", "joules_per_output_token",
)  # fmt: skip
AXES = ("trace", "policy", "settings", *ASKED)
_TEXT = ("id", "status", "reason", "trace", "policy", "settings", "model_name", "limited_by", "summary")
_NUMBERS = ("expert_bits", "gpu_slots_per_layer", "exact", "ceiling_reached")
Row = dict[str, Any]


def schema() -> pa.Schema:
    """Columns of every part. `summary` is what `moesim replay --json` prints; "" where nothing was served."""
    import pyarrow as pa

    kinds = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    asked = [(name, kinds.get(kind.partition(" |")[0], pa.string())) for name, kind in ASKED.items()]
    numbers = [(name, pa.float64()) for name in (*_NUMBERS, *METRICS)]
    return pa.schema([*((name, pa.string()) for name in _TEXT[:-1]), *asked, *numbers, ("summary", pa.string())])


def row(job: Job, summary: dict[str, Any]) -> Row:
    """What is kept of a finished point."""
    inputs = summary["inputs"]
    return _given(job) | {
        "status": summary["status"],
        "reason": summary["status_reason"],
        "model_name": inputs["model"]["name"],
        "expert_bits": inputs["system"]["expert_bits"] or inputs["model"]["expert_bits"],
        "gpu_slots_per_layer": summary["memory"]["slots_per_layer"],
        "limited_by": summary.get("bottleneck", {}).get("limited_by"),
        "exact": summary.get("routing_fidelity", {}).get("overall", {}).get("exact"),
        "ceiling_reached": summary.get("ceiling", {}).get("reached"),
        "summary": to_json(summary),
        **summary["metrics"],
    }


def failure(job: Job, status: str, reason: str) -> Row:
    """What is kept of a point that has no answer, and why."""
    return _given(job) | {"status": status, "reason": reason, "summary": ""}


def _given(job: Job) -> Row:
    point = job.point
    asked = {name: getattr(point.question, name) for name in ASKED}
    if isinstance(asked["machine"], Machine):
        asked["machine"] = asked["machine"].name
    paths = {"trace": str(point.trace), "workload": str(asked["workload"]) if asked["workload"] else None}
    return asked | paths | {"id": job.id, "policy": point.policy, "settings": ", ".join(point.settings)}


class Results:
    """The data set in `folder`, open for one writer: `with Results.open(folder) as results`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.status: dict[str, str] = {}  # of every point that is there, by id
        for part in parts(folder):
            self.status |= {r["id"]: r["status"] for r in read_part(part, ["id", "status"]).to_pylist()}
        self._next = max((int(part.stem.partition("-")[2]) for part in parts(folder)), default=0) + 1

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Results]:
        """Lock the directory, sweep out what a killed writer left half-written, and read what is there."""
        folder.mkdir(parents=True, exist_ok=True)
        strange = [f.name for f in folder.iterdir() if not f.name.startswith((".", "part-"))]
        if strange:
            raise SweepError(f"{folder}: holds {strange[0]}, so it is no sweep's directory; choose another --output")
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SweepError(f"{folder}: another sweep writes to it; wait, or choose another --output") from None
            for left in folder.glob(".p*-*"):  # parts and predictions
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield cls(folder)

    def forget_failures(self) -> None:
        """Take points that broke out of the data set, so that they run again."""
        import pyarrow.compute as pc

        for part in parts(self._folder):
            table = read_part(part)
            kept = table.filter(pc.not_equal(table["status"], FAILED))
            if not len(kept):
                part.unlink()
            elif len(kept) < len(table):
                _write(kept, part)
        self.status = {name: status for name, status in self.status.items() if status != FAILED}

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished points: all of `rows` or none, whatever happens."""
        import pyarrow as pa

        if not rows:
            return
        names = schema().names
        table = pa.Table.from_pylist([{name: r.get(name) for name in names} for r in rows], schema=schema())
        _write(table, self._folder / f"part-{self._next:06d}.parquet")
        self._next += 1
        self.status |= {r["id"]: r["status"] for r in rows}


def _write(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def parts(folder: Path) -> list[Path]:
    """The part files in the order they were written."""
    return sorted(folder.glob("part-*.parquet"))


def read_part(part: Path, columns: Iterable[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(part, columns=None if columns is None else list(columns), schema=None)
    except (pa.ArrowException, OSError) as error:
        raise SweepError(f"{part}: cannot be read ({error}); delete it and run the sweep again") from error


def read_rows(folder: Path, columns: Sequence[str]) -> list[Row]:
    """Every point of a sweep, in order of its id. Raises SweepError where `folder` holds none."""
    found = parts(folder)
    if not found:
        raise SweepError(f"{folder}: holds no results of a sweep; 'moesim sweep SPEC.yaml -o {folder}' makes them")
    rows = [r for part in found for r in read_part(part, ["id", *columns]).to_pylist()]
    return sorted(rows, key=lambda r: r["id"])
