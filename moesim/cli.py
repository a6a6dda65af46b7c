"""The command line. Results go to stdout, everything else to stderr; exit 0 ok, 1 failure, 2 usage, 3 infeasible."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim import __version__
from moesim.errors import MoesimError, WorkloadError

app = typer.Typer(
    name="moesim",
    help="Simulate and plan Mixture-of-Experts inference under limited GPU memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
OK, FAILED, USAGE, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130

TracePath = Annotated[Path, typer.Argument(help="Routing trace (.parquet); `moesim trace import` makes one.")]
PolicyOption = Annotated[
    str, typer.Option("--policy", "-p", help="System, such as eMoE, LRU(scope='global') or my_policy.py:MyPolicy.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model name, config.json or .gguf; default: what the trace says.")
]
MachineOption = Annotated[str, typer.Option("--machine", help="Machine name, YAML file, or 'this'.")]
ExpertMemory = Annotated[
    str | None, typer.Option("--expert-memory", help="GPU memory for routed experts, such as 8GiB; default: all left.")
]
SlotsPerLayer = Annotated[
    int | None, typer.Option("--slots-per-layer", help="Expert slots per MoE layer, instead of --expert-memory.")
]
WorkloadOption = Annotated[
    Path | None,
    typer.Option(
        "--workload",
        help="Requests with arrivals and lengths (docs/bring-a-workload.md).",
    ),
]
RequestRate = Annotated[
    float | None, typer.Option("--request-rate", help="Requests/s, as vLLM's; inf sends all at once.")
]
Burstiness = Annotated[float, typer.Option("--burstiness", help="Shape of the gaps; 1 is Poisson.")]
MaxConcurrency = Annotated[
    int | None,
    typer.Option(
        "--max-concurrency", help="Requests under way at once; default: 1, or no limit where they have times."
    ),
]
MaxNumSeqs = Annotated[int, typer.Option("--max-num-seqs", help="Sequences the server batches at once.")]
NumPrompts = Annotated[int | None, typer.Option("--num-prompts", help="Serve only the first N requests.")]
SloOption = Annotated[float | None, typer.Option("--slo", help="Time promised to each request, ms (eMoE's scheduler).")]
BatchTokens = Annotated[int, typer.Option("--max-batch-tokens", help="New tokens per step.")]
ChunkOption = Annotated[int, typer.Option("--chunk", help="Prompt tokens per request and step; 0 = whole prompts.")]
PreemptionOption = Annotated[
    str, typer.Option("--preemption", help="none: a request waits for its KV cache at its longest; recompute: as vLLM.")
]
PrefixCache = Annotated[
    bool,
    typer.Option("--prefix-cache", help="Prompts begin with what is kept of earlier ones (docs/bring-a-workload.md)."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change one choice, such as eviction.scope=global.")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, events or compiled; equal results, auto is compiled where it can be.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PricesOption = Annotated[
    Path | None, typer.Option("--prices", help="CSV of prices in place of moesim's own (docs/prices.md).")
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Directory for the results.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moesim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _question(
    model: str | None, machine: Any, expert_memory: str | None, slots_per_layer: int | None, workload: Path | None,
    request_rate: float | None, burstiness: float, max_concurrency: int | None, max_num_seqs: int,
    num_prompts: int | None, slo: float | None, max_batch_tokens: int, chunk: int, seed: int, engine: str,
    preemption: str, prefix_cache: bool, goodput: list[str] | None = None, disaggregate: str | None = None,
) -> Any:  # fmt: skip
    """What replay and compare have in common, as one value."""
    from moesim.question import Question, parse_pools, parse_slo
    from moesim.units import parse_size

    return Question(
        model=model,
        machine=machine,
        expert_memory=None if expert_memory is None else parse_size(expert_memory, "--expert-memory"),
        slots_per_layer=slots_per_layer,
        workload=workload,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        max_num_seqs=max_num_seqs,
        num_prompts=num_prompts,
        slo_ms=slo,
        goodput=tuple(parse_slo(text) for text in goodput or ()),
        max_batch_tokens=max_batch_tokens,
        chunk=chunk,
        preemption=preemption,
        prefix_cache=prefix_cache,
        disaggregate=None if disaggregate is None else parse_pools(disaggregate),
        seed=seed,
        engine=engine,
    )


@app.command()
def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Routing trace (.parquet); without one, routing is drawn for --model.", show_default=False),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="System, such as eMoE, LRU(scope='global') or my_policy.py:MyPolicy.")
    ] = "LRU",
    model: ModelOption = None,
    machine: MachineOption = "rtx-4090",
    expert_memory: ExpertMemory = None,
    slots_per_layer: SlotsPerLayer = None,
    workload: WorkloadOption = None,
    request_rate: RequestRate = None,
    burstiness: Burstiness = 1.0,
    max_concurrency: MaxConcurrency = None,
    max_num_seqs: MaxNumSeqs = 256,
    num_prompts: NumPrompts = None,
    random_input_len: Annotated[
        int, typer.Option("--random-input-len", help="Prompt tokens of each request, where there is no trace.")
    ] = 1024,
    random_output_len: Annotated[
        int, typer.Option("--random-output-len", help="Output tokens of each request, where there is no trace.")
    ] = 128,
    slo: SloOption = None,
    goodput: Annotated[
        list[str] | None, typer.Option("--goodput", help="Count requests that keep an SLO in ms, such as ttft:2000.")
    ] = None,
    max_batch_tokens: BatchTokens = 8192,
    chunk: ChunkOption = 0,
    preemption: PreemptionOption = "none",
    prefix_cache: PrefixCache = False,
    disaggregate: Annotated[
        str | None,
        typer.Option("--disaggregate", help="GPUs for prompts:GPUs for outputs, such as 5:3 (docs/several-gpus.md)."),
    ] = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    engine: EngineOption = "auto",
    anchors: Annotated[bool, typer.Option("--anchors/--no-anchors", help="Also run the four anchors.")] = True,
    prices: PricesOption = None,
    placement: Annotated[
        Path | None,
        typer.Option("--placement", help="EPLB map (.json) or TensorRT-LLM YAML: which GPU has which experts."),
    ] = None,
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Write a timeline for ui.perfetto.dev.")] = None,
    as_json: JsonOption = False,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="vllm, aiperf or llama-bench: also write such files to -o, or print the first."),
    ] = None,
    output: OutputOption = None,
) -> None:
    """Replay a routing trace under a policy: does it fit, how fast, what limits it."""
    from moesim.page import format_run
    from moesim.question import compose, run
    from moesim.result_formats import check_format, result_files, write_files
    from moesim.timeline import write_timeline
    from moesim.trace.io import read

    if format_ is not None:
        check_format(format_)
        if as_json and not output:
            raise WorkloadError("--json and --format both print; give --format a directory with -o, or leave one out")
    question = _question(
        model, _priced(machine, prices), expert_memory, slots_per_layer, workload, request_rate, burstiness,
        max_concurrency, max_num_seqs, num_prompts, slo, max_batch_tokens, chunk, seed, engine, preemption,
        prefix_cache, goodput, disaggregate,
    )  # fmt: skip
    if timeline and disaggregate:
        raise WorkloadError("--timeline shows one pool of GPUs; leave it or --disaggregate out")
    if trace is not None:
        routing = read(trace)
    else:
        routing = drawn(model, workload, num_prompts or 16, random_input_len, random_output_len, seed)
    system = compose(policy, settings or [])
    if placement:
        system = _placed(system, placement, routing, question.machine)
    result = run(routing, system, question, anchors=anchors, detail=bool(timeline or output))
    if timeline and result.records.requests:
        write_timeline(result.records, timeline)
    if output:
        result.save(output)
    files = result_files(result, format_) if format_ and result.records.requests else {}
    if output:
        write_files(files, output)
    if files and not output:
        sys.stdout.write(next(iter(files.values())))
    else:
        _print(result.summary, format_run(result), as_json)
    if result.summary["status"] in ("OOM", "CACHE_DISABLED", "OVERLOADED"):
        raise typer.Exit(INFEASIBLE)


def _priced(machine: str, prices: Path | None) -> Any:
    """The machine at the user's price, or its name."""
    if prices is None:
        return machine
    from moesim.machine import load_machine, priced
    from moesim.prices import read_prices

    return priced(load_machine(machine), read_prices(prices))


def _placed(system: Any, placement: Path, routing: Any, machine: Any) -> Any:
    from moesim.machine import load_machine
    from moesim.placement_files import placed

    gpus = (load_machine(machine) if isinstance(machine, str) else machine).gpus
    return placed(system, placement, routing, gpus)


def drawn(model: str | None, workload: Path | None, requests: int, prompt: int, output: int, seed: int) -> Any:
    """Synthetic routing for a model: of requests that long, or a pool that those of a workload file are joined from."""
    from moesim.model import load_model
    from moesim.output import remark
    from moesim.trace.assumed import local_routing, pool_routing

    if model is None:
        raise WorkloadError("neither a trace nor --model: give a routing trace, or name the model to draw routing for")
    known = load_model(model)
    remark(f"no trace: drawing routing for {known.name}, as local as a recorded trace of another model is")
    if workload:
        return pool_routing(known, seed)
    return local_routing(known, requests, prompt, output - 1, seed=seed)


@app.command()
def compare(
    trace: TracePath,
    policies: Annotated[str, typer.Option("--policies", help="Systems, separated by commas; the first is the base.")],
    model: ModelOption = None,
    machine: MachineOption = "rtx-4090",
    expert_memory: ExpertMemory = None,
    slots_per_layer: SlotsPerLayer = None,
    workload: WorkloadOption = None,
    request_rate: RequestRate = None,
    burstiness: Burstiness = 1.0,
    max_concurrency: MaxConcurrency = None,
    max_num_seqs: MaxNumSeqs = 256,
    num_prompts: NumPrompts = None,
    slo: SloOption = None,
    max_batch_tokens: BatchTokens = 8192,
    chunk: ChunkOption = 0,
    preemption: PreemptionOption = "none",
    prefix_cache: PrefixCache = False,
    seed: SeedOption = 0,
    engine: EngineOption = "auto",
    as_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """Replay one trace under several policies: paired differences, request by request."""
    from moesim.compare import compare as compare_policies
    from moesim.compare import format_comparison
    from moesim.systems import split_specs
    from moesim.trace.io import read

    question = _question(
        model, machine, expert_memory, slots_per_layer, workload, request_rate, burstiness, max_concurrency,
        max_num_seqs, num_prompts, slo, max_batch_tokens, chunk, seed, engine, preemption, prefix_cache,
    )  # fmt: skip
    result = compare_policies(read(trace), split_specs(policies), question)
    _print(result, format_comparison(result), as_json, output)


@app.command()
def whatif(
    trace: TracePath,
    policy: PolicyOption = "LRU",
    by: Annotated[float, typer.Option("--by", help="How much better each resource is made, percent.")] = 10.0,
    metric: Annotated[
        str, typer.Option("--metric", help="output_throughput, mean_tpot_ms, mean_ttft_ms or mean_e2el_ms.")
    ] = "output_throughput",
    model: ModelOption = None,
    machine: MachineOption = "rtx-4090",
    expert_memory: ExpertMemory = None,
    slots_per_layer: SlotsPerLayer = None,
    workload: WorkloadOption = None,
    request_rate: RequestRate = None,
    burstiness: Burstiness = 1.0,
    max_concurrency: MaxConcurrency = None,
    max_num_seqs: MaxNumSeqs = 256,
    num_prompts: NumPrompts = None,
    slo: SloOption = None,
    max_batch_tokens: BatchTokens = 8192,
    chunk: ChunkOption = 0,
    preemption: PreemptionOption = "none",
    prefix_cache: PrefixCache = False,
    settings: SetOption = None,
    seed: SeedOption = 0,
    engine: EngineOption = "auto",
    prices: PricesOption = None,
    as_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """What would help most: each resource 10 % better, its next real upgrade, another policy; simulated anew."""
    from moesim.prices import read_prices
    from moesim.question import compose
    from moesim.trace.io import read
    from moesim.whatif import format_whatif
    from moesim.whatif import whatif as ask

    question = _question(
        model, machine, expert_memory, slots_per_layer, workload, request_rate, burstiness, max_concurrency,
        max_num_seqs, num_prompts, slo, max_batch_tokens, chunk, seed, engine, preemption, prefix_cache,
    )  # fmt: skip
    own = read_prices(prices) if prices else None
    result = ask(read(trace), compose(policy, settings or []), question, by / 100, metric, prices=own)
    _print(result, format_whatif(result), as_json, output)
    if result["base"]["value"] is None:
        raise typer.Exit(INFEASIBLE)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory that `moesim replay -o` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write; default: report.html in the run's directory.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a saved run as one self-contained HTML page."""
    from moesim.run_report import write_report

    target = output or run / "report.html"
    summary = write_report(run, target)
    _print({"report": str(target), "status": summary["status"]}, str(target), as_json)


systems = typer.Typer(help="Published systems and baselines.", no_args_is_help=False, invoke_without_command=True)


@systems.callback()
def systems_list(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the systems, with what each does and where it is published."""
    if context.invoked_subcommand:
        return
    from dataclasses import asdict

    from moesim.systems import SYSTEMS

    rows = []
    for name, make in SYSTEMS.items():
        system = make()
        row = {"name": name, "what": (make.__doc__ or "").split("\n")[0], "source": system.source}
        rows.append(row | {"needs": system.needs, "published_quality": system.quality and asdict(system.quality)})
    _print({"systems": rows}, "\n".join(line for row in rows for line in _system_lines(row)), as_json)


def _system_lines(row: dict[str, Any]) -> list[str]:
    """A line on what a system does, then where it is from, what it asks of a trace and what its authors measured."""
    quality = row["published_quality"]
    more = {
        "source": row["source"],
        "needs": ", ".join(row["needs"]),
        "published": quality and f"{quality['reported']} ({quality['source']})",
    }
    return [f"{row['name']:18}  {row['what']}", *(f"{'':20}{what}: {text}" for what, text in more.items() if text)]


@systems.command("show")
def systems_show(name: str, as_json: JsonOption = False) -> None:
    """Print a system's composition, part by part."""
    from dataclasses import asdict

    import yaml

    from moesim.systems import load_system

    system = load_system(name)
    quality = system.quality and asdict(system.quality)
    body = {
        "source": system.source,
        "needs": list(system.needs),
        **system.parts(),
        "published_quality": quality,
        "notes": list(system.notes),
    }
    _print(body, yaml.safe_dump(body, sort_keys=False, allow_unicode=True), as_json)


app.add_typer(systems, name="systems")


def _print(result: Any, text: str, as_json: bool, output: Path | None = None) -> None:
    from moesim.output import emit

    emit(result, text, as_json, output)


def _mount() -> None:
    """Sub-commands live in moesim.commands; `calibrate` beside what it measures, for machines that have no more."""
    from moesim.calibrate.commands import calibrate
    from moesim.commands.capacity import capacity
    from moesim.commands.dashboard import dashboard
    from moesim.commands.doctor import doctor
    from moesim.commands.machine import app as machine_app
    from moesim.commands.model import app as model_app
    from moesim.commands.placement import app as placement_app
    from moesim.commands.plan import plan
    from moesim.commands.policy import app as policy_app
    from moesim.commands.profile import app as profile_app
    from moesim.commands.sweep import app as sweep_app
    from moesim.commands.trace import app as trace_app
    from moesim.commands.validate import app as validate_app

    app.command()(calibrate)
    app.command()(capacity)
    app.command()(dashboard)
    app.command()(doctor)
    app.command()(plan)
    app.add_typer(sweep_app, name="sweep", help="Many runs at once: a grid or a list, results in one data set.")
    app.add_typer(trace_app, name="trace", help="Routing traces: import, check, describe, cut, draw.")
    app.add_typer(model_app, name="model", help="Models: sizes from a name, config.json or GGUF.")
    app.add_typer(placement_app, name="placement", help="Which GPU has which experts, in serving engines' files.")
    app.add_typer(policy_app, name="policy", help="Policies: check one, built in or your own.")
    app.add_typer(profile_app, name="profile", help="Profiles: measured and imported costs of machines.")
    app.add_typer(machine_app, name="machine", help="Machines of the catalogue, and what each rate is taken from.")
    app.add_typer(validate_app, name="validate", help="Predictions against reality.")


_mount()


def main() -> None:
    """Entry point: one line per error, with the exit code it stands for."""
    try:
        code = app(standalone_mode=False) or OK
        if code == INTERRUPTED:
            _fail("interrupted; nothing was written", code)
        sys.exit(code)
    except MoesimError as error:
        _fail(str(error), USAGE)
    except typer.TyperException as error:  # an unknown option or a value of the wrong kind
        message = error.format_message()
        if "Usage:" in message:  # a command that needs another word: its help
            sys.stderr.write(message + "\n")
            sys.exit(USAGE)
        _fail(message, USAGE)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", FAILED)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
