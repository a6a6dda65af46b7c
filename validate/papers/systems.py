"""The twelve papers, each with its claims and targets, in the order of SYSTEMS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from moesim.errors import ValidationError, nearest
from validate.papers import adapmoe, eep, emoe, fmoe, hexa, hobbit, mc, meo, samoyeds, seer, sida, tsep
from validate.papers.claim import FACTOR, Claim
from validate.papers.targets import TARGETS

PAPERS: dict[str, tuple[Claim, ...]] = {
    "SiDA": sida.CLAIMS, "Samoyeds": samoyeds.CLAIMS, "HEXA-MoE": hexa.CLAIMS, "eMoE": emoe.CLAIMS,
    "fMoE": fmoe.CLAIMS, "HOBBIT": hobbit.CLAIMS, "MC": mc.CLAIMS, "AdapMoE": adapmoe.CLAIMS, "EEP": eep.CLAIMS,
    "SEER-MoE": seer.CLAIMS, "MEO": meo.CLAIMS, "TSEP": tsep.CLAIMS,
}  # fmt: skip
SLOWEST = ("fMoE", "SiDA")  # begun first, so that two processes end together
WORKERS = 2
ENOUGH = 8  # main claims reproduced


def choose(only: str | None) -> list[str]:
    """Systems named in `only`, separated by commas, in any case; all where it is None."""
    if only is None:
        return list(PAPERS)
    known = {name.lower(): name for name in PAPERS}
    wanted = [name.strip().lower() for name in only.split(",")]
    for name in wanted:
        if name not in known:
            raise ValidationError(f"--only: unknown system '{name}'{nearest(name, known)}")
    return [name for name in PAPERS if name.lower() in wanted]


def answer(system: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Claims and targets of one paper, as plain values."""
    claims = [claim.answer() for claim in PAPERS[system]]
    targets = [target._asdict() for target in TARGETS[system]()] if system in TARGETS else []
    return claims, targets


def validate(systems: Sequence[str], advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """All claims and targets of `systems`, two papers at a time, and how many are reproduced."""
    order = sorted(systems, key=lambda name: name not in SLOWEST)
    found = {}
    with ProcessPoolExecutor(min(WORKERS, len(order)), get_context("spawn")) as pool:
        waiting = {name: pool.submit(answer, name) for name in order}
        for name in order:
            found[name] = waiting[name].result()
            advance()
    claims = [row for name in systems for row in found[name][0]]
    targets = sorted((row for name in systems for row in found[name][1]), key=lambda row: row["number"])
    summary = summarise(claims)
    passed = summary["main_reproduced"] >= min(ENOUGH, len(systems)) and summary["directions_wrong"] == 0
    return {
        "status": "passed" if passed else "failed",
        "claims": claims,
        "summary": summary,
        "targets": targets,
        "factor": FACTOR,
    }


def summarise(claims: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all claims, over the main ones and by kind."""
    predicted = [row for row in claims if "predicted" in row]
    main = [row for row in claims if row["main"]]
    kinds = dict.fromkeys(row["kind"] for row in predicted)
    return {
        "main": len(main),
        "main_reproduced": sum(row.get("within", False) for row in main),
        "main_directions_wrong": sum(not row.get("direction_right", True) for row in main),
        "claims": len(predicted),
        "reproduced": sum(row["within"] for row in predicted),
        "directions_wrong": sum(not row["direction_right"] for row in predicted),
        "not_set_up": len(claims) - len(predicted),
        "by_kind": {
            kind: [sum(row["within"] for row in predicted if row["kind"] == kind),
                   sum(row["kind"] == kind for row in predicted)]
            for kind in kinds
        },
    }  # fmt: skip
