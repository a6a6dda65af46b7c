"""Ways drawn by Optuna where there are too many to go through: of a large space, and of systems composed anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim import __version__
from moesim.errors import MoesimError
from moesim.output import to_json
from moesim.plan.search import ATTAINED, NAMED, Choice, Row, Search, Space
from moesim.systems import load_system

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

# Shares between 0 and 1 of every resident expert, so that weights trade one against another (policies/eviction.py).
WEIGHTED = ("recency", "frequency", "near")
PREDICTORS = ("none", "transitions", "expert-maps", "request-counts")  # those that learn from the trace's past
EXACT = ("fetch", "host", "cheaper")  # rules that leave outputs as they are
WIDEST = 4  # predicted experts that are copied per layer


def draw(search: Search, space: Space, trials: int, anew: bool, path: Path | None) -> None:
    """Consider up to `trials` ways of `space`, those that promise most by what was found; anew: with the policies'
    parts changed.

    path: a file that keeps every trial, so that a later call goes on where this one ended. Raises MoesimError where
    Optuna is not installed or the file is none of its.
    """
    import_optuna()
    asking = search.asking
    study = _study(path, _fingerprint(asking.model, asking.asked, space, anew), asking.asked.seed)
    for trial in study.get_trials(deepcopy=False):
        if "row" in trial.user_attrs:
            _remember(search, space, json.loads(trial.user_attrs["row"]))
        search.advance()
    for _ in range(trials - len(study.trials)):
        _try(study, search, space, anew)
        search.advance()


def import_optuna() -> Any:
    """optuna, quiet; MoesimError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise MoesimError(
            "so many ways, and systems composed anew, are drawn by Optuna: pip install 'moesim[plan]', or ask for fewer"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(path: Path | None, name: str, seed: int) -> Study:
    optuna = import_optuna()
    directions = ("maximize", "minimize", "minimize")  # throughput, TPOT, $ per hour
    study = optuna.create_study(
        storage=path and _storage(path), study_name=name, directions=directions, load_if_exists=True
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _storage(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if path.exists() and path.stat().st_size:  # or Optuna would append to whatever it is
            with path.open() as file:
                json.loads(file.readline())["op_code"]
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise MoesimError(
            f"--study {path}: no study of Optuna ({error}); name a new file, or an earlier plan's"
        ) from None


def _try(study: Study, search: Search, space: Space, anew: bool) -> None:
    from optuna.trial import TrialState

    trial = study.ask()
    row = search.one(_choice(trial, space, anew))
    if row is None:
        study.tell(trial, state=TrialState.PRUNED)
        return
    trial.set_user_attr("row", to_json(row))
    kept = row["slo_attainment"]
    trial.set_constraint("slos", ATTAINED - (1.0 if kept is None else kept))  # above 0 where they are not kept
    price = row["usd_per_hour"] or 0.0
    study.tell(trial, (row["output_throughput"], row["mean_tpot_ms"] or 0.0, price))


def _remember(search: Search, space: Space, row: Row) -> None:
    machine = next(machine for machine in space.machines if machine.name == row["machine"])
    row["settings"] = tuple(row["settings"])
    search.remember(Choice(machine, *(row[name] for name in NAMED[1:])), row)


def _choice(trial: Trial, space: Space, anew: bool) -> Choice:
    """What a trial stands for."""
    machines = {machine.name: machine for machine in space.machines}
    machine = machines[_pick(trial, "machine", list(machines))]
    bits = _pick(trial, "bits", space.bits)
    policy = _pick(trial, "policy", space.policies)
    concurrency = _pick(trial, "concurrency", space.concurrency)
    kv_share = _pick(trial, "kv_share", space.kv_shares)
    settings = _settings(trial, policy) if anew else ()
    return Choice(machine, bits, policy, concurrency, kv_share, settings)


def _pick(trial: Trial, name: str, values: Sequence[Any]) -> Any:
    return trial.suggest_categorical(name, list(values))


def _settings(trial: Trial, policy: str) -> tuple[str, ...]:
    """Parts of `policy` changed: eviction and start where it evicts, prediction and its width, what a miss does."""
    system, settings = load_system(policy), []
    if system.cache and system.misses.keep and system.eviction.own is None:
        settings += _eviction(trial, policy)
        if system.placement.own is None:
            settings.append(f"placement.start={_pick(trial, f'{policy}: start', ('empty', 'hot'))}")
    if system.cache and not system.placement.pinned:
        predictor = _pick(trial, f"{policy}: predictor", PREDICTORS)
        if predictor != "none":
            width = trial.suggest_int(f"{policy}: prefetch per layer", 1, WIDEST)
            settings += [f"predictor={predictor}", f"prefetch.per_layer={width}"]
            if system.prefetch.order != "layer":  # the other orders rank all layers together
                settings.append("prefetch.order=layer")
    if system.misses.rule == "precision":
        low = trial.suggest_float(f"{policy}: T1", 0.3, 0.9, step=0.1)
        high = trial.suggest_float(f"{policy}: T2 - T1", 0.0, 0.6, step=0.1)
        settings.append(f"misses.thresholds={low:.1f},{low + high:.1f}")
    elif system.misses.rule in EXACT:
        settings.append(f"misses.rule={_pick(trial, f'{policy}: misses', EXACT)}")
    return tuple(settings)


def _eviction(trial: Trial, policy: str) -> list[str]:
    weights = {feature: trial.suggest_int(f"{policy}: {feature}", 0, 4) for feature in WEIGHTED}
    scope = f"eviction.scope={_pick(trial, f'{policy}: scope', ('layer', 'global'))}"
    score = ",".join(f"{feature}:{weight}" for feature, weight in weights.items() if weight)
    return [f"eviction.score={score or 'lru'}", scope]


def _fingerprint(model: Any, asked: Any, space: Space, anew: bool) -> str:
    """What trials depend on: those of another question are not mixed in."""
    machines = [machine.to_dict() for machine in space.machines]
    inputs = [__version__, asdict(model), asdict(asked) | {"workload": str(asked.workload)}, machines, *space[1:], anew]
    return hashlib.sha256(to_json(inputs).encode()).hexdigest()
