"""The four pages. Each runs commands and shows what they print."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from moesim import plots, published_report
from moesim.commands.plan import way
from moesim.dashboard.controls import Shared, take
from moesim.dashboard.jobs import Job, stamps, start
from moesim.dashboard.state import Asked, prices_of, settings_of, to_query, words
from moesim.errors import MoesimError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.output import to_json
from moesim.plan.flags import flags
from moesim.plots import speed_for_each_user, stacked_memory, tornado
from moesim.question import Question, Scene, compose, estimate
from moesim.run_report import figures, write_report
from moesim.trace.assumed import distinct_routing
from moesim.trace.io import read
from moesim.units import format_size

GOOD = ("FITS",)
FAMILIAR = {"output_throughput": "tok/s", "mean_ttft_ms": "TTFT ms", "mean_tpot_ms": "TPOT ms", "hit_rate": "hit rate"}


def fit() -> None:
    """Does it fit, how fast, what limits it, and how to start it."""
    given: Shared = st.session_state["shared"]
    _estimate(given)
    job = _asked_job("replay", given, saved=True)
    summary = _wait(job)
    if job is None or summary is None:
        return
    _verdict(summary)
    _pin(given.asked, summary)
    _downloads(job, summary)
    left, right = st.columns(2)
    drawn = figures(summary, job.folder / "run")
    for column, name in ((left, "critical path"), (right, "anchors")):
        if name in drawn:
            column.plotly_chart(drawn[name], key=name)
    st.subheader("What would help most")
    if given.asked.trace:
        _tornado(given)
    else:
        st.caption("`moesim whatif` needs a trace: upload one, or choose the shipped example.")


def lab() -> None:
    """Is the routing cacheable and predictable, and which system makes most of it."""
    given: Shared = st.session_state["shared"]
    if not given.asked.trace:
        st.info("Choose a routing trace on the left: drawn routing says nothing about a real model's caches.")
        return
    trace = str(given.files.trace(given.asked.trace))
    stats = _wait(_job("stats", ["trace", "stats", trace], given))
    if stats is not None:
        st.info(stats["verdict"])
        left, right = st.columns(2)
        for i, figure in enumerate(_trace_figures(stats)):
            (left if i % 2 == 0 else right).plotly_chart(figure, key=f"lab {i}")
    st.subheader("Systems on this trace")
    chosen = st.text_input(
        "Systems, separated by commas; the first is the base", "LRU, LFU, Belady, oracle", key="compared"
    )
    command = words(given.asked, given.files, "compare")
    at = command.index("--policy")
    command[at : at + 2] = ["--policies", ",".join(part.strip() for part in chosen.split(","))]
    found = _wait(_job("compare", command, given, pressed=True))
    if found is not None:
        rows = [
            {"system": name, "status": one["status"]}
            | {title: one["metrics"].get(key) for key, title in FAMILIAR.items()}
            for name, one in found["policies"].items()
        ]
        st.dataframe(rows, hide_index=True)


def capacity() -> None:
    """How many requests a second keep the SLOs, and which machine serves the model best for its price."""
    given: Shared = st.session_state["shared"]
    st.subheader("Requests a second that keep the SLOs")
    if given.asked.trace and (given.asked.ttft or given.asked.tpot):
        command = words(given.asked, given.files, "capacity")
        found = _wait(_job("capacity", command, given, pressed=True))
        if found is not None:
            a, b, c = st.columns(3)
            a.metric("requests/s", f"{found['rate']:.4g}")
            b.metric("over three draws of the arrivals", f"{found['low']:.4g} to {found['high']:.4g}")
            c.metric("breaks first", str(found["breaks_first"] or "nothing"))
    else:
        st.caption("Set a TTFT or TPOT SLO and a trace on the left.")
    st.subheader("Machines, precisions and systems")
    trace = given.asked.trace
    model = given.asked.model or (read(given.files.trace(trace)).info.model if trace else "gpt-oss-20b")
    left, right = st.columns(2)
    machines = left.text_input("Machines, separated by commas", "rtx-4090, rtx-3090, l40s", key="machines")
    objective = right.selectbox("Best in", ["throughput", "latency", "cost"], key="objective")
    options = {
        "--model": given.files.known(model), "--machine": machines.replace(" ", ""), "--objective": objective,
        "--random-input-len": given.asked.input, "--random-output-len": given.asked.output,
    }  # fmt: skip
    command = ["plan", *(str(word) for option in options.items() for word in option)]
    slos = (("ttft", given.asked.ttft), ("tpot", given.asked.tpot))
    command += [word for name, ms in slos if ms for word in ("--goodput", f"{name}:{ms:g}")]
    if prices := given.files.prices(_prices(given, machines)):
        command += ["--prices", str(prices)]
    found = _wait(_job("plan", command, given, pressed=True))
    if found is not None:
        _plan(found)


def timeline() -> None:
    """What happened when, and how far predictions are from reality."""
    given: Shared = st.session_state["shared"]
    job = _asked_job("replay", given, saved=True)
    summary = _wait(job)
    if job is not None and summary is not None:
        for name, figure in figures(summary, job.folder / "run").items():
            if name in ("latency", "steps", "layers"):
                st.plotly_chart(figure, key=name)
        busy = summary.get("bottleneck", {}).get("utilisation", {})
        st.dataframe([{"resource": name, "busy": f"{share:.1%}"} for name, share in busy.items()], hide_index=True)
        drawn = ["--timeline", "timeline.json"]
        st.caption("For a Gantt chart of every copy and kernel, open the file of this command in ui.perfetto.dev:")
        st.code(shlex.join(["moesim", *words(given.asked, given.files), *drawn]), language=None)
    st.subheader("Profiles, and how good their fits are")
    listed = _wait(_job("profiles", ["profile", "list"], given))
    if listed is not None:
        st.dataframe(listed.get("profiles", listed), hide_index=True)
    st.subheader("Predicted beside measured")
    st.caption("Every published measurement that comes with moesim, predicted anew; docs/accuracy.md has them.")
    found = _wait(_job("published", ["validate", "published"], given, pressed=True))
    if found is not None:
        _accuracy(found)


# -- running commands ---------------------------------------------------------------------------------------------


def _asked_job(verb: str, given: Shared, saved: bool = False) -> Job | None:
    try:
        return _job(verb, words(given.asked, given.files, verb), given, saved)
    except FileNotFoundError as error:
        st.error(str(error))
        return None


def _job(name: str, command: list[str], given: Shared, saved: bool = False, pressed: bool = False) -> Job | None:
    """The job that runs `command`, started now or, if `pressed`, when the button is; one by that name at a time."""
    jobs: dict[str, Job] = st.session_state.setdefault("jobs", {})
    job = jobs.get(name)
    if job is not None and job.words == command:
        return job
    if pressed:
        left, right = st.columns([1, 5], vertical_alignment="center")
        right.code(shlex.join(["moesim", *command]), language=None, wrap_lines=True)
        if not left.button("Run", key=f"run {name}"):
            return None
    if job is not None:
        job.cancel()
    jobs[name] = start(command, given.home / "results", saved)
    if pressed:  # the button goes
        st.rerun()
    return jobs[name]


def _wait(job: Job | None) -> dict[str, Any] | None:
    """The job's answer; while it runs, its time and a button that stops it."""
    if job is None:
        return None
    if job.running:
        _watch(job)
        return None
    if job.error:
        st.error(job.error)
        if st.button("Run again", key=f"again {job.folder.name}"):
            st.session_state["jobs"] = {n: j for n, j in st.session_state["jobs"].items() if j is not job}
            st.rerun()
        return None
    return job.answer


@st.fragment(run_every=0.4)
def _watch(job: Job) -> None:
    if not job.running:
        st.rerun()
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.progress(
        min(job.seconds / (job.seconds + 5), 0.99), f"`moesim {job.words[0]}` has run for {job.seconds:.0f} s"
    )
    if right.button("Cancel", key=f"cancel {job.folder.name}"):
        job.cancel()
        st.rerun()


# -- showing results ----------------------------------------------------------------------------------------------


def _estimate(given: Shared) -> None:
    """What is known at once, before anything is simulated."""
    try:
        trace = str(given.files.trace(given.asked.trace)) if given.asked.trace else ""
        machine = given.files.known(given.asked.machine)
        model = given.files.known(given.asked.model) if given.asked.model else ""
        found = _known_at_once(given.asked, trace, machine, model, stamps([trace, machine, model]))
    except (MoesimError, FileNotFoundError) as error:
        st.error(str(error))
        return
    show = st.success if found["status"] in GOOD else st.warning
    top = found.get("ceiling", {}).get("output_throughput")
    bound = f" · at most {top:.4g} tok/s for one request" if top else ""
    show(f"**{found['status']}** {found['status_reason']}{bound}")
    st.plotly_chart(_memory(found["memory"]), key="memory")
    if found.get("most_slots", 0) > 1:
        _divider(given.asked, found)
    for engine, line in found["flags"].items():
        st.caption(f"To start {engine} so:")
        st.code(line, language="bash")


@st.cache_data(max_entries=50)
def _known_at_once(
    asked: Asked, trace: str, machine: str, model: str, files: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """files: as they were when this was asked."""
    question = Question(
        model=model or None, machine=machine, slots_per_layer=asked.slots, max_concurrency=asked.users,
        num_prompts=asked.prompts if trace else None,
    )  # fmt: skip
    if trace:
        routing = read(Path(trace))
    else:
        served = load_model(model or "gpt-oss-20b")
        question = replace(question, model=served)
        routing = distinct_routing(served, min(asked.users or 1, 64), asked.input, asked.output - 1)
    system = compose(asked.policy, settings_of(asked))
    scene = Scene(routing, question).under(system)
    published = not settings_of(asked)
    return estimate(routing, system, question) | {
        "flags": flags(system, scene, scene.model.expert_bits, True) if published else {}
    }


def _divider(asked: Asked, found: dict[str, Any]) -> None:
    """Moves GPU memory between KV caches and cached experts, as --slots-per-layer does."""
    memory, key = found["memory"], f"divider {to_query(asked)}"
    experts, kv = (format_size(memory[name]) for name in ("expert_bytes", "kv_bytes"))

    def moved() -> None:
        take(replace(asked, slots=st.session_state[key]))

    now = min(max(memory["slots_per_layer"], 1), found["most_slots"])
    st.slider(
        f"Experts {experts}, {now} slots per layer | KV caches {kv}, for {found['at_once']} at once",
        1, found["most_slots"], now, key=key, on_change=moved,
    )  # fmt: skip
    if asked.slots is not None:
        st.button("As fits beside the KV caches of all requests", on_click=partial(take, replace(asked, slots=None)))


def _memory(memory: dict[str, Any]) -> Any:
    tiers = {"GPU": "gpu_bytes", "host": "host_bytes", "NVMe": "nvme_bytes"}
    figure = stacked_memory({tier: memory[key] for tier, key in tiers.items() if memory[key]})
    return figure.update_layout(height=260)


def _verdict(s: dict[str, Any]) -> None:
    m = s["metrics"]
    inputs = s["inputs"]
    doubts = []
    if inputs["trace"]["provenance"] != "real":
        doubts.append("Routing is synthetic: drawn, not recorded.")
    if inputs["costs"] == "specification-sheet":
        doubts.append("Costs are from specification sheets; `moesim calibrate` on the machine replaces them.")
    if doubts:
        st.info(" ".join(doubts))
    if "EXTRAPOLATED" in s["status_reason"]:
        st.warning(s["status_reason"])
    if not m:
        st.error(f"**{s['status']}** {s['status_reason']}")
        return
    band = s["uncertainty"]["output_throughput"]
    a, b, c, d = st.columns(4)
    a.metric("output tok/s", f"{m['output_throughput']:.4g}", help="over the cost band")
    a.caption(f"{band[0]:.4g} to {band[1]:.4g} over the cost band")
    b.metric("TTFT p99, ms", f"{m['p99_ttft_ms']:.4g}")
    c.metric("TPOT mean, ms", "-" if m["mean_tpot_ms"] is None else f"{m['mean_tpot_ms']:.4g}")
    d.metric("of the ceiling", f"{s['ceiling']['reached']:.1%}")
    kept = f" · {m['slo_attainment']:.1%} of the requests keep every SLO" if "slo_attainment" in m else ""
    limit = s["bottleneck"]["explanation"]
    st.markdown(f"**{s['status']}** · limited by {limit}{kept} · {m['hit_rate']:.1%} of the lookups hit")
    exact = s["routing_fidelity"]["overall"]["exact"]
    if exact < 1:
        st.caption(f"{exact:.1%} of the routed weight is served as chosen; quality is not modelled.")


def _pin(asked: Asked, summary: dict[str, Any]) -> None:
    """Keep this configuration as A, and show what another changes."""
    if st.button("Pin as A, to compare with what you choose next", key="pin"):
        st.session_state["pinned"] = (asked, summary)
    if "pinned" not in st.session_state:
        return
    before, a = st.session_state["pinned"]
    if before == asked or not (a["metrics"] and summary["metrics"]):
        return
    changed = {name: (to_query(before).get(name, "default"), value) for name, value in to_query(asked).items()
               if to_query(before).get(name) != value}  # fmt: skip
    gain = summary["metrics"]["output_throughput"] / a["metrics"]["output_throughput"] - 1
    (low, high), (lo, hi) = (one["uncertainty"]["output_throughput"] for one in (a, summary))
    apart = lo > high or hi < low
    text = ", ".join(f"{name} {old} to {new}" for name, (old, new) in changed.items())
    st.markdown(
        f"Against A ({text or 'defaults'}): **{gain:+.1%}** tok/s, "
        + ("more than the costs are uncertain" if apart else "within the cost bands of both taken alone")
    )


def _downloads(job: Job, summary: dict[str, Any]) -> None:
    command = shlex.join(["moesim", *job.words])
    files: list[tuple[str, Any, str, str]] = [
        ("Summary (JSON)", to_json(summary) + "\n", "summary.json", "application/json"),
        ("Command", command + "\n", "moesim.sh", "text/plain"),
    ]
    requests = job.folder / "run" / "requests.parquet"
    if requests.is_file():
        files.append(("Requests (Parquet)", requests.read_bytes(), "requests.parquet", "application/octet-stream"))
        files.append(("Report (HTML)", partial(_report, job.folder / "run"), "report.html", "text/html"))
    for column, (label, data, name, kind) in zip(st.columns(4), files, strict=False):
        column.download_button(label, data, name, kind, width="stretch", on_click="ignore")
    st.code(command, language=None)


def _report(run: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_report(run, Path(folder, "report.html"))
        return Path(folder, "report.html").read_bytes()


def _trace_figures(stats: dict[str, Any]) -> list[Any]:
    lru = {name: np.array(values) for name, values in stats["lru"].items() if name != "distances"}
    reuse = {side: {int(n): np.array(v) for n, v in stats["reuse"][side].items()} for side in ("within", "chance")}
    unique = {name: np.array(values) for name, values in stats["unique"].items()}
    return [
        plots.miss_ratio_curve(lru["capacities"], lru["miss_ratio"], lru["belady"], lru["static"], lru["random"]),
        plots.popularity_heatmap(np.array(stats["popularity"]), stats["moe_layers"]),
        plots.reuse_curve(reuse["within"], reuse["chance"]),
        plots.unique_experts(unique["batches"], unique["mean"], unique["independent"], stats["experts"]),
    ]


def _tornado(given: Shared) -> None:
    found = _wait(_job("whatif", words(given.asked, given.files, "whatif"), given, pressed=True))
    if found is None:
        return
    rows = sorted(found["changes"], key=lambda row: -abs(row["gain"] or 0))[:8]
    felt = [row for row in rows if row["gain"] is not None]
    bars = [(f"{row['resource']}: {row['what']}", row["gain"], *row["gain_p10_p90"]) for row in felt]
    st.plotly_chart(tornado(FAMILIAR[found["metric"]], bars), key="tornado")
    st.dataframe(
        [
            {
                "change": f"{row['resource']}: {row['what']}",
                "gain": None if row["gain"] is None else f"{row['gain']:+.1%}",
                "P10 to P90": row["gain_p10_p90"] and "{:+.1%} to {:+.1%}".format(*row["gain_p10_p90"]),
                "beyond the uncertainty": row["significant"],
                "$ per hour": row["usd_per_hour"],
            }
            for row in rows
        ],
        hide_index=True,
    )


def _prices(given: Shared, machines: str) -> str:
    """$ per hour of the machines named, moesim's own until others are entered."""
    own, names = prices_of(given.asked.prices), {}
    for name in filter(None, (part.strip() for part in machines.split(","))):
        try:
            machine = load_machine(given.files.known(name))
        except (MoesimError, FileNotFoundError):  # the plan says it
            continue
        names[machine.name] = machine.usd_per_hour
    columns = st.columns(max(len(names), 3))
    for column, (name, shipped) in zip(columns, names.items(), strict=False):
        price = column.number_input(
            f"$ per hour, {name}", 0.001, value=own.get(name), key=f"price {name}",
            placeholder="not known" if shipped is None else f"{shipped:g}",
        )  # fmt: skip
        own = {n: p for n, p in own.items() if n != name} | ({name: price} if price else {})
    text = "; ".join(f"{name}={price:g}" for name, price in sorted(own.items()))
    if own != prices_of(given.asked.prices):
        st.session_state["asked"] = replace(given.asked, prices=text)
        st.rerun()
    return text


def _accuracy(found: dict[str, Any]) -> None:
    """The scatter of one metric, and signed errors where different things limit."""
    drawn = published_report.figures(found)
    metric = st.selectbox("Metric", list(drawn), key="metric")
    st.plotly_chart(drawn[metric], key="accuracy")
    scores = [{"regime": name} | score for name, score in found["regimes"].items()]
    st.dataframe(scores, hide_index=True)


def _plan(found: dict[str, Any]) -> None:
    best = found["best"]
    if best is None:
        st.error("Nothing keeps the SLOs.")
    else:
        low, high = best["p10_p90"]
        st.success(
            f"**{way(best)}**: "
            f"{best['output_throughput']:.4g} tok/s (P10 to P90: {low:.4g} to {high:.4g}); "
            f"limited by {best['limited_by']}"
        )
        for engine, line in best["flags"].items():
            st.code(f"# {engine}\n{line}", language="bash")
    st.plotly_chart(_front(found), key="front")
    columns = ("machine", "bits", "policy", "concurrency", "kv_share", "output_throughput", "mean_ttft_ms",
               "mean_tpot_ms", "usd_per_million_output_tokens", "keeps_slos")  # fmt: skip
    st.dataframe([{name: row[name] for name in columns} for row in found["candidates"]], hide_index=True)
    with st.expander(f"{len(found['excluded'])} excluded, with reasons"):
        st.dataframe(found["excluded"], hide_index=True)


def _front(found: dict[str, Any]) -> Any:
    """What no other way beats in throughput, TPOT and price, and the rest, where a way has a TPOT."""
    points: dict[str, list[tuple[float, float, str]]] = {"no other is better at once": [], "others": []}
    for row in found["candidates"]:
        if row["mean_tpot_ms"]:
            on_front = {name: row[name] for name in found["pareto"][0]} in found["pareto"]
            at = 1000 / row["mean_tpot_ms"], row["output_throughput"], way(row)
            points["no other is better at once" if on_front else "others"].append(at)
    return speed_for_each_user(points)
