"""The roofline's primitives answered from a profile: each from its curve, and from the specification sheet where the
profile lacks one.

What a table measures decides what it may answer: attention curves hold no projections, grouped curves hold the routed
experts' kernels from sorting to combining but not the router. Which number format a curve is for follows from the bits
per weight; a format nobody measured stays with the roofline.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from moesim.costs.families import ACTIVITIES
from moesim.costs.fit import Curve, faster, rescale
from moesim.costs.roofline import Attended, Roofline
from moesim.machine import Machine

if TYPE_CHECKING:
    from moesim.model import Model
    from moesim.profile import Profile

_SLOWED = 1.1  # times as long beside others as alone: below it measurements cannot tell
_ALL_TO_ALL = ("dispatch", "combine")  # of tokens to the GPUs that hold their experts, and back
PREFERRED = "vllm"  # engine whose kernels are taken where a profile holds those of several


def costs_of(
    machine: Machine, scale: str = "default", graph: bool = True, repacked: bool = True, native: bool = False
) -> Roofline:
    """Costs of `machine` from its profile, or from its specification sheet where it has none.

    graph: kernels are launched as CUDA graphs; repacked, native: as for `Roofline`.
    """
    if not machine.profile:
        return Roofline(machine, scale, graph, repacked, native)
    from moesim.profile import read_profile

    return Fitted(machine, read_profile(machine.profile), scale, graph, repacked, native)


class Fitted(Roofline):
    """Costs of `machine` from `profile`. scale: `low` and `high` are the slow and fast ends of every curve's band.

    assumed: primitives that fell back to the roofline when asked; extrapolated: curves asked beyond what was measured.
    """

    def __init__(
        self, machine: Machine, profile: Profile, scale: str = "default", graph: bool = True, repacked: bool = True,
        native: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(machine, scale, graph, repacked, native)
        self.label = profile.label
        self.assumed: set[str] = _not_measured(profile)
        self.extrapolated: set[str] = set()
        self._curves: dict[str, list[Curve]] = {}
        for curve in profile.curves:
            moved = faster(rescale(curve, scale), *_gains(curve, machine))
            self._curves.setdefault(curve.family, []).append(moved)
        for curves in self._curves.values():
            curves.sort(key=_preference)
        self._chosen: dict[tuple[Any, ...], list[Curve]] = {}
        self._model: Model | None = None
        self.sparse_measured = any(c.variant[1] == "2:4" for c in self._choose("sparse_gemm", dtypes(16)))
        self._measure_links()

    def serving(self, model: Model) -> Fitted:
        """The same curves for the shapes of `model`; what was assumed or extrapolated is noted together."""
        bound = copy.copy(self)
        bound._model = model
        return bound

    # The GPU

    def gemm(
        self, rows: int, params: float, nbytes: float, bits: float = 16, kernels: int = 1, depth: float = 0
    ) -> float:
        """As the roofline's: `kernels` equal matrices."""
        if not rows or not params:
            return 0.0
        # vLLM's block-scaled rows hold 60 to 85 us of launching by the host, which CUDA graphs do away with.
        curves = self._choose("gemm", tuple(reversed(dtypes(bits))) if bits < 16 else dtypes(bits))
        if not curves:
            self.assumed.add(f"gemm at {bits:.3g} bits")
            return super().gemm(rows, params, nbytes, bits, kernels, depth)
        depth = depth or (self._model.hidden if self._model else math.sqrt(params / kernels))
        depth = min(depth, params / kernels)
        width = params / kernels / depth
        low, high = curves[0].range["n"]
        pieces = max(1, math.ceil(width / high))  # wider than any that was measured: several side by side
        return kernels * pieces * self._ask(curves, m=rows, n=max(width / pieces, low), k=depth)

    def sparse_gemm(self, rows: int, n: int, k: int) -> float:
        """From measured 2:4 rows, or the dense curve and the published speed-ups."""
        measured = [c for c in self._choose("sparse_gemm", dtypes(16)) if c.variant[1] == "2:4"]
        if measured and rows:
            return self._ask(measured, m=rows, n=n, k=k)
        dense_bytes = 2.0 * n * k
        ratio = super().sparse_gemm(rows, n, k) / super().gemm(rows, n * k, dense_bytes) if rows else 0.0
        return ratio * self.gemm(rows, n * k, dense_bytes, depth=k)

    def grouped(self, active: int, pairs: int, *, params: int, nbytes: float, pair_bytes: float, bits: float) -> float:
        """As the roofline's; without a model the experts are taken to be square."""
        if not active or not pairs:
            return 0.0
        matrices = self._model.ffn_matrices if self._model else 3
        curves = [c for c in self._choose("grouped", dtypes(bits)) if c.variant[-1] == matrices]
        if not curves:
            self.assumed.add(f"grouped experts at {bits:.3g} bits")
            return super().grouped(active, pairs, params=params, nbytes=nbytes, pair_bytes=pair_bytes, bits=bits)
        hidden = self._model.hidden if self._model else math.sqrt(params / matrices)
        shape = {"active": active, "hidden": hidden, "ffn": params / matrices / hidden}
        if self._model:
            shape |= {"experts": self._model.experts, "top_k": self._model.top_k}
        return self._ask(curves, pairs=max(pairs, active), routed=max(pairs, active), **shape)

    many_at_once = False

    def attention(self, nbytes: float, flops: float, shape: Attended | None = None) -> float:
        """As the roofline's; the mean sequence stands for all of a batch."""
        model = self._model
        if shape is None or model is None:
            return super().attention(nbytes, flops)
        family = ("mla_" if model.mla else "attention_") + ("prefill" if shape.tokens else "decode")
        curves = self._choose(family, dtypes(model.kv_bits))
        if not model.mla:
            # One token sees at most the window, so a curve without windows serves decoding; a prefill it does not.
            windows = {shape.window} if shape.tokens or any(c.variant[2] == shape.window for c in curves) else {0}
            curves = [c for c in curves if c.variant[2] in windows]
        if not curves:
            self.assumed.add(f"{family.replace('_', ' ')} at {model.kv_bits:.3g} bits")
            return super().attention(nbytes, flops)
        features: dict[str, float] = {"batch": shape.sequences, "heads": model.heads}
        if not model.mla:
            features |= {"kv_heads": model.kv_heads, "head_dim": model.head_dim}
        if shape.tokens:
            return self._ask(curves, tokens=shape.tokens, past=shape.past, **features)
        return self._ask(curves, context=shape.past, **features)

    def layer(self, nbytes: float) -> float:
        """Two norms and the rotary embedding; launching them outside a graph stays with the roofline."""
        norm = self._one("small", ("norm",))
        rope = self._one("small", ("rope",))
        if norm is None or rope is None:
            return super().layer(nbytes)
        half = max(nbytes / 2, 1)
        return self._eager + 2 * self._ask([norm], nbytes=half / 2) + self._ask([rope], nbytes=half)

    # The host and the links

    def host_expert(self, tokens: int, params: int, nbytes: float) -> float:
        if not tokens or self._model is None:
            return super().host_expert(tokens, params, nbytes)
        wanted = dtypes(8 * nbytes / params)
        curves = [c for c in self._choose("host_expert", wanted) if c.variant[1] == self._model.ffn_matrices]
        if not curves:
            return super().host_expert(tokens, params, nbytes)
        shape = {"hidden": self._model.hidden, "ffn": params / self._model.ffn_matrices / self._model.hidden}
        return self._ask(curves, tokens=tokens, threads=round(1 / curves[0].range["share_of_thread"][0]), **shape)

    def handoff(self) -> float:
        curve = self._one("handoff", ())
        if curve is None or self._model is None:
            return super().handoff()
        return self._ask([curve], tokens=1, hidden=self._model.hidden)

    def copy(self, nbytes: float, parts: int = 1) -> float:
        """As the roofline's: from a curve of as many parts, or from single copies of one part each."""
        pinned = int(self.machine.host.pinned)
        whole, single = self._copy_curve("h2d", pinned, parts), self._copy_curve("h2d", pinned)
        if self.machine.unified or not nbytes or single is None:
            return super().copy(nbytes, parts)
        if whole is not None:
            return self._ask([whole], nbytes=nbytes)
        return parts * self._ask([single], nbytes=nbytes / parts)

    def read(self, nbytes: float) -> float:
        curve = self._reading()
        return super().read(nbytes) if curve is None or not nbytes else self._ask([curve], nbytes=nbytes)

    # Between devices

    def exchange(self, what: str, nbytes: float, devices: int) -> float:
        """As the roofline's. `dispatch` and `combine` are DeepEP's all_to_all, or any where that was not measured.

        A number of devices that was not measured counts as the next larger one that was. Of NCCL's and the preferred
        engine's kernels the quickest, as engines choose by size.
        """
        if devices < 2 or not nbytes:
            return 0.0
        measured = self._curves.get("collective", [])
        own = [
            c for c in measured
            if c.variant[2] == f"deepep {what}" and c.variant[1] == devices and nbytes <= c.range["nbytes"][1]
        ]  # fmt: skip
        what = "all_to_all" if what in _ALL_TO_ALL else what
        curves = own or [c for c in measured if c.variant[0] == what and c.variant[1] >= devices and _engines(c)]
        if not curves:
            self.assumed.add(f"{what.replace('_', '-')} between {devices} GPUs")
            return super().exchange(what, nbytes, devices)
        fewest = min(curve.variant[1] for curve in curves)
        return min(self._ask([curve], nbytes=nbytes) for curve in curves if curve.variant[1] == fewest)

    def _network(self, nbytes: float) -> float:
        self.assumed.add("exchanges between hosts")
        return super()._network(nbytes)

    # Choosing and asking

    def _measure_links(self) -> None:
        """Rates that transfers under way share: those the physics of the curves found."""
        pinned = int(self.machine.host.pinned)
        single, drive = self._copy_curve("h2d", pinned), self._reading()
        both = [self._copy_curve(direction, pinned, both=1) for direction in ("h2d", "d2h")]
        if single is not None and not self.machine.unified:
            self.copy_gbps = single.physics.bandwidth / 1e9
            together = sum(curve.physics.bandwidth / 1e9 for curve in both if curve is not None)
            self.duplex_gbps = max(self.copy_gbps, together if all(both) else self.duplex_gbps)
        if drive is not None:
            self.read_gbps = drive.physics.bandwidth / 1e9
        if not self.machine.unified:
            self._measure_sharing()

    def _measure_sharing(self) -> None:
        """What copies, CPU experts and drive reads draw from host memory at the same time.

        If none is slowed by the others, memory holds at least that sum; if one is, the sum is all it holds.
        """
        curves = {str(curve.variant[0]): curve for curve in self._curves.get("together", [])}
        users = [name for name in ("h2d", "host", "disk") if name in curves]
        nbytes = min((curves[name].range["nbytes"][1] for name in users), default=0)
        others = [
            name for name in users if all(f"with_{name}" in _measured_beside(curves[o]) for o in users if o != name)
        ]
        if len(others) < 2 or "host" not in others:
            return
        flags = {name: int(name in others) for name in ACTIVITIES}
        alone = dict.fromkeys(ACTIVITIES, 0)
        total, slowed = 0.0, False
        for name in others:
            mixed = curves[name].seconds(nbytes=nbytes, **flags)
            slowed |= mixed > _SLOWED * curves[name].seconds(nbytes=nbytes, **alone)
            total += nbytes / mixed / 1e9
        total *= _gain(self.machine, "host", "dram_gbps")
        self.dram_gbps = max(total, self.copy_gbps) if slowed else max(self.dram_gbps, total)

    def _copy_curve(self, direction: str, pinned: int, parts: int = 1, both: int = 0) -> Curve | None:
        return self._one("copy", (direction, pinned, 1, parts, both))

    def _reading(self) -> Curve | None:
        """Cold reads, at the depth that is fastest."""
        cold = [curve for curve in self._curves.get("read", []) if curve.variant[0] == 1]
        return max(cold, key=lambda curve: curve.physics.bandwidth, default=None)

    def _one(self, family: str, variant: tuple[Any, ...]) -> Curve | None:
        return next((c for c in self._curves.get(family, []) if c.variant == variant), None)

    def _choose(self, family: str, wanted: tuple[str, ...]) -> list[Curve]:
        """Curves of a family whose number format is the first of `wanted` that was measured, best first."""
        key = (family, wanted)
        found = self._chosen.get(key)
        if found is None:
            measured = [curve.variant[0] for curve in self._curves.get(family, [])]
            dtype = next((name for name in wanted if name in measured), None)
            found = [curve for curve in self._curves.get(family, []) if curve.variant[0] == dtype]
            self._chosen[key] = found
        return found

    def _ask(self, curves: list[Curve], **features: float) -> float:
        """The first curve measured at `features`; where none was, the first, and that it extrapolated."""
        for curve in curves:
            seconds, outside = curve.ask(**features)
            if not outside:
                return seconds
        curve = curves[0]
        self.extrapolated.add(curve.name)
        return curve.ask(**features)[0]


def _gains(curve: Curve, machine: Machine) -> tuple[float, float]:
    """How much faster bytes and operations of a curve have become since it was measured."""
    match curve.family:
        case "copy":
            return _gain(machine, "pcie", "gbps"), 1.0
        case "read":
            return _gain(machine, "nvme", "gbps"), 1.0
        case "host_expert":
            return _gain(machine, "host", "dram_gbps"), _gain(machine, "host", "cores")
        case "collective":
            return _gain(machine, "gpu", "nvlink_gbps"), 1.0
        case "launch" | "handoff" | "together":
            return 1.0, 1.0
    eight = str(curve.variant[0]).startswith("fp8")
    return _gain(machine, "gpu", "hbm_gbps"), _gain(machine, "gpu", "fp8_tflops" if eight else "tflops")


def _gain(machine: Machine, part: str, rate: str) -> float:
    """A rate over what it was when the profile was measured; 1 where either is unknown."""
    if machine.measured_on is None:
        return 1.0
    now, then = (getattr(getattr(m, part), rate, None) for m in (machine, machine.measured_on))
    return float(now / then) if now and then else 1.0


def _engines(curve: Curve) -> bool:
    """Whether a serving engine that launches graphs uses this collective kernel."""
    kernel = str(curve.variant[2]).lower()
    return kernel == "nccl" or (kernel.startswith(PREFERRED) and not kernel.endswith("eager"))


def _measured_beside(curve: Curve) -> set[str]:
    """Flags of a `together` curve that were measured both on and off."""
    return {name for name, (low, high) in curve.range.items() if low != high}


def dtypes(bits: float) -> tuple[str, ...]:
    """Number formats that `bits` per weight, scales included, may stand for; none where it is ambiguous."""
    for low, high, names in _FORMATS:
        if low <= bits < high:
            return names
    return ()


_FORMATS: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (4.2, 4.3, ("mxfp4",)),
    (4.0, 4.2, ("int4",)),  # GPTQ and AWQ; GGUF's formats of 4.5 bits and more have kernels of their own
    (8.0, 8.1, ("fp8_block", "fp8")),
    (16.0, 16.1, ("bf16", "fp16")),
    (32.0, 32.1, ("fp32", "tf32")),
)


def _not_measured(profile: Profile) -> set[str]:
    """What every question needs and the profile has no curve for."""
    families = {curve.family for curve in profile.curves}
    needed = {"copy": "copies", "read": "drive reads", "host_expert": "experts on the CPU", "handoff": "hand-offs",
              "small": "small kernels"}  # fmt: skip
    return {what for name, what in needed.items() if name not in families}


def _preference(curve: Curve) -> tuple[bool, int]:
    """Kernels of the preferred engine first, then those with most points."""
    return (not any(str(part).startswith(PREFERRED) for part in curve.variant), -curve.points)
