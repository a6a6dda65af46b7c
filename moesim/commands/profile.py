"""`moesim profile`: what was measured on a machine, how well its curves predict, and tables of others as profiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.output import emit

if TYPE_CHECKING:
    from moesim.costs.fit import Curve
    from moesim.profile import Profile

app = typer.Typer(no_args_is_help=True, help="Profiles: measured or imported costs of a machine.")

Spec = Annotated[str, typer.Argument(help="Name of a shipped profile, or the directory of one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here instead of printing it.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """The profiles that come with moesim; every other machine of the catalogue is priced by its specification sheet."""
    from moesim.machine import catalogue
    from moesim.profile import read_profile_meta, shipped

    metas = [read_profile_meta(name) for name in shipped()]
    known = {meta["machine"] for meta in metas}
    lines = [f"{meta['name']:12} {meta['provenance']:9} {meta['gpu']:24} {_engine(meta)}" for meta in metas]
    others = [name for name in catalogue() if name not in known]
    lines.append(f"specification-sheet only: {', '.join(others)}")
    emit({"profiles": metas, "specification_sheet": others}, "\n".join(lines), as_json)


def _engine(meta: dict[str, Any]) -> str:
    """Whose kernels: an engine's, or those of torch as it was where the profile was measured."""
    return str(meta.get("engine") or f"torch {meta['torch']}")


@app.command()
def show(
    profile: Spec,
    *,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write the curves as an HTML page.")] = None,
    as_json: Json = False,
    output: Report = None,
) -> None:
    """A profile's conditions, and per family how many shapes were measured, their range and the hold-out error."""
    from moesim.profile import read_profile

    found = read_profile(profile)
    if plot is not None:
        from moesim.profile_plots import write_page

        write_page(found, plot)
    report = describe(found)
    emit(report, _page(found, report), as_json, output)


@app.command()
def compare(first: Spec, second: Spec, *, as_json: Json = False) -> None:
    """How much slower the second profile is, over shapes both cover; kernels are held beside those that do the same."""
    from moesim.profile import read_profile
    from moesim.profile_compare import compare as compare_profiles

    a, b = read_profile(first), read_profile(second)
    rows = compare_profiles(a, b)
    names = [r["curve"] if r["curve"] == r["beside"] else f"{r['curve']} | {r['beside']}" for r in rows]
    width = max((len(name) for name in names), default=0) + 2
    lines = [f"{'curve':{width}}{'median':>8}{'P10':>8}{'P90':>8}   time of {b.name} over {a.name}"]
    for name, r in zip(names, rows, strict=True):
        lines.append(f"{name:{width}}{r['median']:>8.3f}{r['p10']:>8.3f}{r['p90']:>8.3f}")
    if not rows:
        lines = [f"{a.name} and {b.name} have no curve in common"]
    emit({"first": a.name, "second": b.name, "curves": rows}, "\n".join(lines), as_json)


@app.command()
def check(profile: Spec, *, as_json: Json = False) -> None:
    """Whether a measured profile still fits this machine: driver, CUDA, torch, GPU, CPU. Exits 1 where it does not."""
    from moesim.profile import read_profile
    from moesim.profile_compare import changed

    found = read_profile(profile)
    changes = changed(found)
    if found.meta["provenance"] == "imported":
        text = f"{found.name}: imported, so it has no machine here to compare with"
    else:
        text = "\n".join(changes) or f"{found.name}: conditions are as they were"
    emit({"profile": found.name, "fresh": not changes, "changes": changes}, text, as_json)
    if changes:
        raise typer.Exit(1)


@app.command()
def sparse(
    machine: Annotated[str, typer.Argument(help="Machine, machine file or profile directory.")],
    *,
    n: Annotated[int, typer.Option(help="Outputs of the matrix.", min=64, max=1 << 20)] = 14336,
    k: Annotated[int, typer.Option(help="Inputs of the matrix.", min=64, max=1 << 20)] = 4096,
    as_json: Json = False,
) -> None:
    """Speed-up of 2:4 sparse weights against rows, and from how many rows they pay."""
    from moesim.costs.families import sparse_weight_bytes
    from moesim.costs.fitted import costs_of
    from moesim.costs.sparse import SOURCE, break_even, speedups
    from moesim.machine import load_machine

    costs = costs_of(load_machine(machine))
    points = speedups(costs, n, k)
    pays = break_even(points)
    kept = sparse_weight_bytes(n, k, "fp16", "2:4")
    basis = "measured" if costs.sparse_measured else SOURCE
    lines = [
        f"{m:>6} rows  {gain:5.2f}  {'#' * round(20 * gain)}{'  pays from here' * (m == pays)}" for m, gain in points
    ]
    lines += [
        f"weights {kept / 2**20:.1f} MiB of {2 * n * k / 2**20:.1f} MiB, positions included",
        f"2:4 pays from {pays} rows" if pays else "2:4 never pays",
        f"basis: {basis}; dense costs: {costs.label}",
    ]
    report = {"n": n, "k": k, "speedup": dict(points), "break_even_rows": pays, "weight_bytes": kept, "basis": basis}
    emit(report, "\n".join(lines), as_json)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="File or folder of the tables of one machine.")],
    *,
    form: Annotated[str, typer.Option("--format", help="aiconfigurator, llmservingsim, vidur or freetoken.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the profile; its name is the profile's.")
    ],
    machine: Annotated[
        str | None, typer.Option(help="Catalogue machine the tables are of; its specification sheet fills the gaps.")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Keep only kernels of this engine; may be repeated.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Where the tables come from; default: the project's address.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Their licence; default: the project's.")] = None,
    as_json: Json = False,
) -> None:
    """Fit curves to another project's tables. Prints how well a random half of the shapes predicts the other half."""
    from moesim.errors import CalibrationError
    from moesim.machine import load_machine
    from moesim.profile import write_profile
    from moesim.profile_import import import_profile

    if output.resolve() == path.resolve():
        raise CalibrationError(f"{output}: is the folder of the tables; choose another --output")
    named = load_machine(machine).name if machine else None
    found = import_profile(form, path, output.resolve().name, named, source, licence, tuple(engine or ()))
    write_profile(found, output)
    report = describe(found)
    emit(report, _page(found, report), as_json)


def describe(profile: Profile) -> dict[str, Any]:
    """What `moesim profile show --json` prints: conditions, families, and every curve.

    A family's errors are the medians over the held-out shapes of its curves, each counting by its points.
    repeatability: how far a sample of one shape typically lies from the median of all (None without raw rows).
    """
    families: dict[str, Any] = {}
    for name in dict.fromkeys(curve.family for curve in profile.curves):
        curves = profile.of_family(name)
        points = sum(curve.points for curve in curves)
        families[name] = {
            "points": points,
            "holdout_median_error": sum(c.points * c.holdout_median_error for c in curves) / points,
            "p90": sum(c.points * c.p90 for c in curves) / points,
            "repeatability": _repeatability(profile, name),
            "range": _widest(curves),
            "curves": [_curve(curve) for curve in curves],
        }
    return {"name": profile.name, "meta": dict(profile.meta), "families": families}


def _repeatability(profile: Profile, family: str) -> float | None:
    from statistics import median

    rows = [row for row in profile.samples if row["family"] == family and "mad_s" in row]
    return median(row["mad_s"] / row["seconds"] for row in rows) if rows else None


def _widest(curves: list[Curve]) -> dict[str, list[float]]:
    """Lowest and highest value per axis over all curves of a family."""
    ranges = [curve.range for curve in curves]
    return {a: [min(r[a][0] for r in ranges), max(r[a][1] for r in ranges)] for a in ranges[0]}


def _curve(curve: Curve) -> dict[str, Any]:
    p = curve.physics
    return {
        "variant": list(curve.variant),
        "points": curve.points,
        "holdout_median_error": curve.holdout_median_error,
        "p90": curve.p90,
        "band": list(curve.band),
        "range": {name: list(ends) for name, ends in curve.range.items()},
        "physics": {
            "overhead_s": p.overhead,
            "bandwidth": p.bandwidth,
            "rate": p.rate,
            "sharpness": p.sharpness,
            "tile": p.tile,
        },
    }


def _page(profile: Profile, report: dict[str, Any]) -> str:
    meta = profile.meta
    shown = (
        "machine",
        "gpu",
        "engine",
        "cpu",
        "driver",
        "cuda",
        "torch",
        "clocks",
        "pcie",
        "memory",
        "date",
        "source",
        "licence",
    )
    lines = [f"{profile.label}, {len(profile.curves)} curves from {sum(c.points for c in profile.curves)} shapes"]
    lines += [f"  {name:9}{meta[name]}" for name in shown if meta.get(name) not in (None, "")]
    lines += ["", "hold-out error: shapes left out of the fit; fixed time and rates are those of the physics"]
    lines += ["repeats: how far samples of one shape lie from their median"] * bool(profile.samples) + [""]
    header = f"{'curve':58}{'shapes':>8}{'median':>8}{'P90':>7}{'fixed us':>10}{'GB/s':>8}{'TFLOPS':>8}"
    lines.append(header + f"{'repeats':>9}" * bool(profile.samples))
    for name, found in report["families"].items():
        spread = found["repeatability"]
        repeats = "" if spread is None else f"{'':26}{spread:>9.1%}"
        errors = f"{found['holdout_median_error']:>8.1%}{found['p90']:>7.1%}"
        lines.append(f"{name:58}{found['points']:>8}{errors}{repeats}")
        lines += [_line(curve) for curve in profile.of_family(name)]
    lines += [f"left out: {note}" for note in meta.get("left_out", ())]
    return "\n".join(lines)


def _line(curve: Curve) -> str:
    p = curve.physics
    rate = f"{p.rate / 1e12:>8.1f}" if p.rate < 1e30 else f"{'-':>8}"
    what = " ".join(map(str, curve.variant))
    what = what if len(what) <= 55 else f"{what[:40]}...{what[-12:]}"
    errors = f"{curve.holdout_median_error:>8.1%}{curve.p90:>7.1%}"
    return f"  {what:56}{curve.points:>8}{errors}{p.overhead * 1e6:>10.2f}{p.bandwidth / 1e9:>8.0f}{rate}"
