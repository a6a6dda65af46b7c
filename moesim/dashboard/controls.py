"""The sidebar: every input, kept in the page's address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import streamlit as st

from moesim.dashboard.state import EXAMPLES, Asked, Files, from_query, to_query
from moesim.errors import MoesimError
from moesim.machine import THIS


@dataclass(frozen=True)
class Shared:
    """What every page is given."""

    asked: Asked
    files: Files
    home: Path


def shared(asked: Asked, files: Files, home: Path) -> None:
    st.session_state["shared"] = Shared(asked, files, home)


def controls(files: Files) -> Asked:
    """Draw them; what they say. The address has the last word when a page is opened, the controls afterwards."""
    if "asked" not in st.session_state:
        st.session_state["asked"], st.session_state["notes"] = from_query(st.query_params.to_dict())
    before: Asked = st.session_state["asked"]
    with st.sidebar:
        _examples()
        asked = _inputs(before, files)
        _upload(files)
    for note in st.session_state["notes"]:
        st.warning(f"{note}; the default is shown")
    if asked != before:
        st.session_state["asked"], st.session_state["notes"] = asked, []
    st.query_params.from_dict(to_query(asked))
    return asked


def _examples() -> None:
    with st.expander("Examples"):
        for name, example in EXAMPLES.items():
            st.button(name, on_click=partial(take, example), width="stretch")


def take(asked: Asked) -> None:
    """Make the controls show `asked`: they are drawn anew under other keys."""
    st.session_state["asked"], st.session_state["notes"] = asked, []
    st.session_state["drawn"] = st.session_state.get("drawn", 0) + 1


def _inputs(a: Asked, files: Files) -> Asked:
    key = f"{st.session_state.get('drawn', 0)}-{{}}".format
    models, machines, systems = _names()
    traces = ["", *files.traces()]
    if a.trace not in traces:
        st.warning(f"trace '{a.trace}' is not here: upload it again; routing is drawn meanwhile")
        a = replace(a, trace="")
    trace = st.selectbox(
        "Routing trace",
        traces,
        traces.index(a.trace),
        format_func=lambda t: t or "none: drawn, synthetic",
        key=key("trace"),
    )
    model = st.selectbox(
        "Model", ["", *files.uploaded(".json"), *models], index=None if a.model else 0, key=key("model"),
        placeholder=a.model, format_func=lambda m: m or ("the trace's" if trace else "gpt-oss-20b"),
        accept_new_options=True,
    )  # fmt: skip
    known = [THIS, *files.profiles(), *files.uploaded(".yaml"), *machines]
    machine = _choice("Machine", known, a.machine, key("machine"), {THIS: "this: where moesim runs"})
    policy = _choice("System", systems, a.policy, key("policy"))
    changes = st.text_input(
        "Changes to it", a.set, key=key("set"), placeholder="misses.rule=cheaper; predictor=transitions",
        help="`--set` of the command line, separated by semicolons",
    )  # fmt: skip
    left, right = st.columns(2)
    slots = left.number_input(
        "Expert slots", 1, value=a.slots, placeholder="as fits", key=key("slots"), help="experts cached per layer"
    )
    users = right.number_input("Requests at once", 1, value=a.users, placeholder="1", key=key("users"))
    rate = left.number_input("Requests/s", 0.001, value=a.rate, placeholder="all at once", key=key("rate"))
    prompts = right.number_input(
        "Requests", 1, value=a.prompts, placeholder="all" if trace else "16", key=key("prompts")
    )
    size = a.input, a.output
    if not trace:
        size = (
            int(left.number_input("Prompt tokens", 1, value=a.input, key=key("input"))),
            int(right.number_input("Output tokens", 2, value=a.output, key=key("output"))),
        )
    ttft = left.number_input("TTFT SLO, ms", 0.001, value=a.ttft, placeholder="none", key=key("ttft"))
    tpot = right.number_input("TPOT SLO, ms", 0.001, value=a.tpot, placeholder="none", key=key("tpot"))
    seed = st.number_input("Seed", 0, value=a.seed, key=key("seed"))
    named = a.model if model is None else model
    return replace(
        a, trace=trace, model=named, machine=machine, policy=policy, set=changes, slots=slots, users=users, rate=rate,
        prompts=prompts, input=size[0], output=size[1], ttft=ttft, tpot=tpot, seed=int(seed),
    )  # fmt: skip


def _choice(label: str, names: list[str], value: str, key: str, shown: Mapping[str, str] = MappingProxyType({})) -> str:
    """One of the names, or another that is typed; shown: how some of them are."""
    names = names if value in names else [value, *names]
    chosen: Any = st.selectbox(
        label,
        names,
        names.index(value),
        key=key,
        accept_new_options=True,
        format_func=lambda n: shown.get(n, n),
    )
    return chosen or value


@st.cache_data
def _names() -> tuple[list[str], list[str], list[str]]:
    from moesim import machine, model
    from moesim.systems import SYSTEMS

    return [name.rpartition("/")[2] for name in model.catalogue()], list(machine.catalogue()), list(SYSTEMS)


def _upload(files: Files) -> None:
    with st.expander("Upload a trace, config.json, machine or profile"):
        given = st.file_uploader("File", type=["parquet", "json", "yaml", "zip"], max_upload_size=200)
        if given is None or st.session_state.get("uploaded") == given.file_id:
            return
        try:
            name = files.add(given.name, given.getvalue())
        except (ValueError, MoesimError) as error:
            st.error(str(error))
            return
        st.session_state["uploaded"] = given.file_id
        asked: Asked = st.session_state["asked"]
        part = {".parquet": "trace", ".json": "model"}.get(Path(name).suffix, "machine")
        take(replace(asked, **{part: name}))  # type: ignore[arg-type]
        st.rerun()
