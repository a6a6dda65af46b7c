"""`moesim machine`: what is known of a GPU and its host, and where each figure comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.output import emit

if TYPE_CHECKING:
    from moesim.machine import Machine

app = typer.Typer(no_args_is_help=True, help="Machines of the catalogue, and what each rate is taken from.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here instead of printing it.")]


@app.command("list")
def list_(as_json: Json = False, output: Report = None) -> None:
    """The machines known by name: one GPU each, in a host of its class."""
    from moesim.machine import catalogue

    machines = list(catalogue().values())
    lines = [f"{'name':16}{'GiB':>6}{'GB/s':>7}{'TFLOPS':>8}{'host GiB':>10}{'GB/s':>6}{'PCIe GB/s':>11}{'$/h':>7}"]
    lines += [_row(machine) for machine in machines]
    lines.append("hosts are assumed; 'moesim machine info NAME' says what else is, and why")
    emit({"machines": [machine.to_dict() for machine in machines]}, "\n".join(lines), as_json, output)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Name in the catalogue, or a YAML or JSON file.")],
    as_json: Json = False,
    output: Report = None,
) -> None:
    """A machine's rates as stated, the rates engines reach, and every term between the two with its source."""
    from moesim.machine import load_machine

    machine = load_machine(name)
    terms = _terms(machine)
    lines = [
        f"{machine.name}: {machine.summary}",
        f"source: {machine.source}",
        f"assumed: {machine.assumed or 'nothing'}",
        "",
    ]
    lines.append(f"{'term':18}{'value':>9}{'slow':>8}{'fast':>8}  unit")
    lines += [
        f"{n:18}{t['value']:>9g}{t['low']:>8g}{t['high']:>8g}  {t['unit']}: {t['meaning']}" for n, t in terms.items()
    ]
    emit(machine.to_dict() | {"terms": terms}, "\n".join(lines), as_json, output)


def _row(machine: Machine) -> str:
    gpu, host = machine.gpu, machine.host
    price = machine.prices.known
    shared = f"{'shared':>10}{'':>6}{'-':>11}"
    apart = f"{host.memory_bytes / 2**30:>10.0f}{host.dram_gbps:>6.0f}{machine.pcie.gbps:>11.1f}"
    memory = f"{gpu.memory_bytes / 2**30:>6.0f}{gpu.hbm_gbps:>7.0f}{gpu.tflops:>8.0f}"
    return f"{machine.name:16}{memory}{shared if machine.unified else apart}" + (
        f"{price:>7.2f}" if price else f"{'-':>7}"
    )


def _terms(machine: Machine) -> dict[str, dict[str, Any]]:
    """Every efficiency as it holds for this machine; one measured on it has no band."""
    from moesim.efficiencies import SCALES, efficiencies, terms

    values = [vars(efficiencies(scale, machine.efficiencies)) for scale in SCALES]
    measured = dict(machine.efficiencies)
    return {
        name: {
            "value": values[1][name],
            "low": values[0][name],
            "high": values[2][name],
            "unit": term.unit,
            "meaning": term.meaning,
            "source": "measured on this machine" if name in measured else term.source,
        }
        for name, term in terms().items()
    }
