"""A device as arrays: what the compiled functions read and change. Names of columns, and the one tuple that holds all.

Every expert that may hold a slot has a key, layer x 2 experts + expert; ids from `experts` on are low-precision copies.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox
from numba.np.arrayobj import getitem_array_tuple, make_array, populate_array, setitem_array
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

from moesim.records import KERNEL, LAYER, TRANSFER

I64: TypeAlias = NDArray[np.int64]
F64: TypeAlias = NDArray[np.float64]

# Columns of `entry`, a row per key: an expert that holds a slot. BEFORE and AFTER: see moesim.engine.compiled.victims.
# Eight of them lie side by side in a core's cache: those of every lookup come first.
(
    BUSY, GUARD, LAST_USE, NEXT_USE, TOKENS, PREFETCHED, BEFORE, AFTER,
    BROUGHT, BYTES, HIGH_USES, KEPT, LAST_STEP, READ_END, USES, MEMBER,
) = range(16)  # fmt: skip
PINNED = 2  # value of KEPT
ABSENT, RESERVED, LANDED = range(3)  # values of `held`

# Columns of `copy`: an expert on its way. USED counts up at each use of the row.
(
    C_LAYER, C_EXPERT, C_KEY, C_SIZE, C_LEFT, C_PARTS, C_DEMAND, C_EXPIRES, C_KEEP, C_PROMOTED, C_FLYING,
    C_RESERVED, C_LINK, C_ON_READ, C_READ_END, C_WANTED, C_TICK, C_NEXT, C_TOKENS, C_AFTER, C_BEFORE, C_QUEUE,
    C_CHAIN, C_LATE, C_USED,
) = range(25)  # fmt: skip
NONE = -1

# Columns of `link`: the copy engines, the NVMe drive and the host executor, in the order of moesim.records.LINKS.
(
    L_BUSY, L_COPY, L_STARTED, L_PART, L_BUSY_NS, L_BYTES, L_FLIGHT, L_HEAD, L_COUNT,
) = range(9)  # fmt: skip

# Event kinds.
LINK_END, FLOW_END, HANDOFF, FORESEEN, PLAN, WAKE, LANDING = range(7)

# Counters and registers, columns of `g`.
(
    NOW, EVENT_ID, EVENTS, POSITION, TICK, STEPS, SEQUENCE_STEPS, BROUGHT_IN, SCRATCH, BLOCKED, OUTSTANDING,
    HOSTING, DEFERRED, SETTLED, WAKING, LANDING_AWAITED, FREE_COPY, ARRIVED_HEAD, ARRIVED, DONE, FLOWS,
    THROTTLED, FLOW_VERSION, STAMP, LOOKUPS, HITS, LATES, MISSES, HOSTED, EVICTIONS, PREFETCHED_N,
    PREFETCHED_BYTES, PREFETCH_USED_BYTES, DROPPED, SPENT_STEP, SPENT_MIXER, SPENT_EXPERTS, SPENT_PREDICT,
    SPENT_PCIE, SPENT_NVME, SPENT_HOST, LAYER_ROWS, TRANSFER_ROWS, KERNEL_ROWS, PHASE, AT_STEP, AT_LAYER,
    STARTED, BEGAN, ROUTED, WANTED, RESIDENT, HOSTED_HERE, HITS_BEFORE, LATES_BEFORE, MISSES_BEFORE, WAITED,
    NEEDS, PLANNED_N, ARENA_TOP, CALLS_TOP, TIMERS, PEAK, TIER_HEAD, TIER_TAIL, TIER_USED, ERROR, UNTIL,
    IDLE_NS, ROW_AT, ROW_END, NEXT_END,
) = range(72)  # fmt: skip
SPENT = {
    "step": SPENT_STEP, "mixer": SPENT_MIXER, "experts": SPENT_EXPERTS, "predict": SPENT_PREDICT,
    "pcie": SPENT_PCIE, "nvme": SPENT_NVME, "host": SPENT_HOST,
}  # fmt: skip

# What a choice lowers to, columns of `choice`.
(
    LAYERS, EXPERTS, TOP_K, GLOBAL, CHANGING, FEATURE, TERMS, PRODUCT, HORIZON, LOOKS_AHEAD, RULE, KEEP, DEFER,
    WRITE_BACK, UNIT_LAYER, PARTS, PER_LAYER, FIRST_MISSING, PIN, LATENCY, BLOCKING, ORDER, BULK, CACHE,
    KEEPS_PREFETCHED, LOW_POOLS, UNIFIED, HANDOFF_NS, TIERED, TIER_CAPACITY, DETAIL, SEED, WAVES, COUNTS_TOTALS,
    STEALS, FLUID, SHARED, PINNED_START, LATE_HOST, HOST_BELOW, LISTED,
) = range(41)  # fmt: skip
FETCH, ON_HOST, CHEAPER, REROUTE, SKIP_RULE, PRECISION = range(6)  # RULE
BY_LAYER, LINEAR, INVERSE = range(3)  # ORDER
FEATURES = (
    "lru",
    "lfu",
    "count",
    "fifo",
    "hot",
    "belady",
    "plan",
    "random",
    "recency",
    "frequency",
    "high",
    "near",
    "prob",
)
(F_LRU, F_LFU, F_COUNT, F_FIFO, F_HOT, F_BELADY, F_PLAN, F_RANDOM, F_RECENCY, F_FREQUENCY, F_HIGH, F_NEAR, F_PROB) = (
    range(13)
)

# Columns of `wave`: one set of beliefs inside `believed`.
W_FIRST, W_WIDTH, W_DISTANCE, W_WRAPS, W_MAP = range(5)
C_TARGET, C_OFFSET, C_LENGTH, C_POSITION = range(4)  # columns of `call`: a belief about one layer, for a prefetch

S_POOL, S_LAYER, S_EXPERT, S_REAL, S_SIZE = range(5)
# columns of `static`; S_REAL: the expert at full precision; S_SIZE: its place in `size` and `part_ns`

COST_HIGH, COST_LOW, COST_HOST = range(3)  # first part of a key of the table of costs

DONE_RUN, NEED_COSTS, STUCK, FULL = range(4)  # how a call ends


# The arrays of one device: name, "i" or "f", and what its shape and values are. K keys, C copies, P pools.
FIELDS = (
    ("g", "i", 1),
    ("choice", "i", 1),
    ("weight", "f", 1),  # [terms] of the score
    ("feature", "i", 1),  # [terms]
    ("thresholds", "f", 1),  # [2] of the rule `precision`
    ("entry", "i", 2),  # [K, 16]
    ("held", "h", 1),  # [K] whether it holds a slot: ABSENT, RESERVED or LANDED
    ("plan", "f", 1),  # [K]
    ("copy", "i", 2),  # [C, 32]
    ("copy_plan", "f", 1),  # [C]
    ("coming", "w", 1),  # [K] copy, or NONE
    ("static", "w", 2),  # [K, 8]: see S_POOL
    ("size", "i", 1),  # [sizes] bytes of an expert
    ("part_ns", "i", 3),  # [sizes, 3 parts, 4]: bytes; ns of H2D, of NVMe; [.., 0, 3]: D2H of the whole expert
    ("landed", "i", 1),  # [layers] experts that have landed
    ("here", "i", 1),  # [layers] experts that hold a slot
    ("pool", "i", 2),  # [P, 8]: see moesim.engine.compiled.victims
    ("member", "i", 2),  # [P, slots] keys that hold a slot of the pool
    ("heap", "i", 2),  # [P, twice the slots]: keys of evictable experts and of some that no longer are
    ("offered", "i", 2),  # [K, 3]: see moesim.engine.compiled.victims
    ("offered_score", "f", 1),  # [K]
    ("popularity", "f", 2),  # [layers, experts]
    ("totals", "i", 2),  # [layers, experts]
    ("belief", "f", 2),  # [layers, experts] newest belief of each layer
    ("has_belief", "i", 1),  # [layers]
    ("link", "i", 2),  # [4, 9]
    ("queue", "i", 2),  # [8, 2]: first, last copy of each link's demands (2 x link) and prefetches (2 x link + 1)
    ("ring", "i", 3),  # [2, items, 3]: work waiting for D2H and for the host: bytes, ns, key or copy
    ("flow", "f", 2),  # [4, 3]: bytes left, own rate, rate
    ("flow_at", "i", 2),  # [4, 3]: since, end, version
    ("flow_order", "i", 1),  # [4]
    ("capacity", "f", 1),  # [2] bytes/ns of DRAM and PCIe
    ("uses", "i", 1),  # [4]: bit 0 DRAM, bit 1 PCIe
    ("event", "i", 2),  # [items, 5]: time, id, kind, two values; a heap by time and id
    ("tier", "i", 2),  # [K, 3]: held, before, after: host memory in order of use
    ("tier_bytes", "i", 1),  # [K]
    ("arrived", "i", 1),  # [2 experts] keys that landed and were not computed
    ("done", "i", 1),  # [2 experts] keys computed in the present layer
    ("planned", "i", 2),  # [K, 2]: copy, its STATE
    ("older", "i", 1),  # [K] copies of the plan before
    ("wanted", "i", 2),  # [2 experts + 1, 2]: expert, tokens
    ("mark", "i", 1),  # [2 experts] last STAMP
    ("count", "i", 1),  # [2 experts] place in `wanted`, or tokens
    ("tally", "i", 1),  # [experts] tokens that chose it, while they are counted
    ("next_of", "i", 1),  # [experts] next use of those chosen
    ("taken", "i", 1),  # [k] what serves a token's choices
    ("resident", "i", 1),  # [2 experts] keys
    ("late", "i", 1),  # [2 experts] copies
    ("missed", "i", 1),  # [2 experts] copies
    ("asked", "i", 1),  # [2 experts] copies, demands in order
    ("need", "i", 2),  # [items, 3]: costs the table lacks
    ("single", "i", 2),  # [3, tokens] ns of one expert by COST_HIGH, COST_LOW, COST_HOST, or NONE
    ("cost_key", "i", 1),  # [power of two]
    ("cost_ns", "i", 1),
    ("arena", "i", 1),  # believed experts of the calls
    ("call", "i", 2),  # [items, 4]
    ("rates", "f", 1),  # [4]
    ("rank", "f", 1),  # [items]
    ("ranked", "i", 2),  # [items, 3]: target, expert, position
    ("values", "f", 3),  # [plans under way, layers, experts]
    ("altered", "i", 3),  # [3, layers, tasks]
    ("layer_row", "i", 2),  # [rows, 10]
    ("transfer_row", "i", 2),  # [rows, 7]
    ("kernel_row", "i", 2),  # [rows, 4]
    # The steps to be done in one call.
    ("row", "i", 1),  # trace rows, step after step, and at the end those that follow the last step's
    ("first", "i", 1),  # [steps + 2] where each step's rows begin, where those that follow do, and their number
    ("mixer_ns", "i", 2),  # [steps, kinds of layers]
    ("kind", "i", 1),  # [layers]
    ("step_ns", "i", 1),  # [steps]
    ("slots", "i", 2),  # [steps or 0, P] capacities, where the KV cache takes from the experts
    ("end", "i", 1),  # [steps] when each ended
    # The trace and what is believed of it.
    ("chosen", "h", 3),  # [tokens, layers, k]
    ("next_use", "w", 3),  # the same, or empty
    ("believed", "h", 3),  # [tokens, layers, all waves' candidates]
    ("wave", "i", 2),  # [waves, 5]
    ("maps", "e", 4),  # [waves with one, tokens, layers, experts]
    ("share", "i", 3),  # [tokens, layers, k] gate weight in whole parts, or empty
    ("task", "w", 1),  # [tokens]
    ("preference", "e", 3),  # [tokens, layers, experts] gate probabilities, or empty
)
DTYPES: dict[str, Any] = {"i": np.int64, "f": np.float64, "h": np.int16, "w": np.int32, "e": np.float32}


# Numbers in a row where a constant helps.
WIDTHS = {
    "entry": 16, "copy": 32, "static": 8, "pool": 8, "offered": 3, "link": 9, "queue": 2, "ring": 3, "flow": 3,
    "flow_at": 3, "event": 5, "tier": 3, "planned": 2, "wanted": 2, "need": 3, "call": 4, "ranked": 3, "wave": 5,
    "layer_row": len(LAYER), "transfer_row": len(TRANSFER), "kernel_row": len(KERNEL),
}  # fmt: skip
WORDS = 5  # of a field in the table: address, shape


class State:
    """The arrays of FIELDS, which compiled functions find through one table of addresses and shapes.

    As a plain tuple of arrays each call inside compiled code would pass some five hundred values.
    """

    def __init__(self, **arrays: NDArray[Any]) -> None:
        self._table = np.zeros((len(FIELDS), WORDS), dtype=np.int64)
        self.address = self._table.ctypes.data
        for name, _, _ in FIELDS:
            self.put(name, arrays.pop(name))
        assert not arrays

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Use `array` from now on."""
        at = _PLACE[name]
        _, kind, ndim = FIELDS[at]
        assert array.ndim == ndim and array.flags.c_contiguous
        assert array.dtype == DTYPES[kind]
        assert array.shape[-1] == WIDTHS.get(name, array.shape[-1])
        setattr(self, name, array)
        self._table[at, 0] = array.__array_interface__["data"][0]
        self._table[at, 1 : 1 + ndim] = array.shape

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> NDArray[Any]: ...


_PLACE = {name: i for i, (name, _, _) in enumerate(FIELDS)}


class StateType(types.Type):
    """State inside compiled code: the address of its table."""

    def __init__(self) -> None:
        super().__init__(name="MoesimState")


_STATE = StateType()


@typeof_impl.register(State)
def _typeof_state(value: State, context: Any) -> StateType:
    return _STATE


@register_model(StateType)
class _StateModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.IntType(64))


@unbox(StateType)
def _unbox_state(kind: Any, value: Any, c: Any) -> NativeValue:
    address = c.pyapi.object_getattr_string(value, "address")
    native = c.pyapi.long_as_longlong(address)
    c.pyapi.decref(address)
    return NativeValue(native, is_error=c.pyapi.c_api_error())


class Field(types.Array):
    """An array of FIELDS, or a row of one. Whole numbers that index it are never negative, so nothing is spent on
    counting back from the end."""

    def __init__(self, dtype: Any, ndim: int) -> None:
        super().__init__(dtype, ndim, "C", name=f"MoesimField({dtype}, {ndim})")

    @property
    def mangling_args(self) -> tuple[str, tuple[Any, ...]]:
        return self.name, ()

    def copy(self, dtype: Any = None, ndim: Any = None, layout: Any = None, readonly: Any = None) -> Any:
        if dtype is None and ndim and ndim < self.ndim and layout == "C":
            return Field(self.dtype, ndim)
        return super().copy(dtype, ndim, layout, readonly)


register_model(Field)(models.ArrayModel)


def _field(name: str) -> Field:
    _, kind, ndim = FIELDS[_PLACE[name]]
    return Field(from_dtype(np.dtype(DTYPES[kind])), ndim)


@infer_getattr
class _StateAttributes(AttributeTemplate):
    key = StateType

    def generic_resolve(self, kind: Any, name: str) -> Any:  # type: ignore[override]
        return _field(name) if name in _PLACE else None


@lower_getattr_generic(StateType)
def _lower_attribute(context: Any, builder: Any, kind: Any, address: Any, name: str) -> Any:
    """`state.name` as an array over the memory that the table tells of."""
    array_type = _field(name)
    word = ir.IntType(64)
    table = builder.inttoptr(address, word.as_pointer())

    def entry(i: int) -> Any:
        value = builder.load(builder.gep(table, [word(WORDS * _PLACE[name] + i)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))  # the table stays as it is during a call
        return value

    array = make_array(array_type)(context, builder)
    shape = [entry(1 + i) for i in range(array_type.ndim)]
    if name in WIDTHS:
        shape[-1] = word(WIDTHS[name])
    strides: list[Any] = []
    size_of = np.dtype(DTYPES[FIELDS[_PLACE[name]][1]]).itemsize
    stride = word(size_of)
    for size in reversed(shape):
        strides.insert(0, stride)
        stride = builder.mul(stride, size)
    data = builder.inttoptr(entry(0), context.get_data_type(array_type.dtype).as_pointer())
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=word(size_of), meminfo=None)
    return array._getvalue()


def _element(context: Any, builder: Any, field: Any, array: Any, kinds: Any, indices: Any) -> Any:
    """Address of the element, or of the first one of what the indices leave."""
    array = make_array(field)(context, builder, array)
    strides = cgutils.unpack_tuple(builder, array.strides, field.ndim)
    offset = ir.Constant(ir.IntType(64), 0)
    for kind, index, stride in zip(kinds, indices, strides, strict=False):
        offset = builder.add(offset, builder.mul(context.cast(builder, index, kind, types.intp), stride))
    at = builder.gep(builder.bitcast(array.data, ir.IntType(8).as_pointer()), [offset], inbounds=True)
    return builder.bitcast(at, array.data.type)


def _get(context: Any, builder: Any, sig: Any, array: Any, kinds: Any, indices: Any) -> Any:
    field, result = sig.args[0], sig.return_type
    at = _element(context, builder, field, array, kinds, indices)
    if not isinstance(result, types.Array):
        return builder.load(at)
    whole, part = make_array(field)(context, builder, array), make_array(result)(context, builder)
    shape = cgutils.unpack_tuple(builder, whole.shape, field.ndim)[len(indices) :]
    strides = cgutils.unpack_tuple(builder, whole.strides, field.ndim)[len(indices) :]
    populate_array(part, data=at, shape=shape, strides=strides, itemsize=whole.itemsize, meminfo=None)
    return part._getvalue()


@lower_builtin(operator.getitem, Field, types.Integer)
def _get_by_number(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _get(context, builder, sig, args[0], [sig.args[1]], [args[1]])


@lower_builtin(operator.getitem, Field, types.BaseTuple)
def _get_by_numbers(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    index: Any = sig.args[1]
    kinds = list(index.types)
    if not all(isinstance(kind, types.Integer) for kind in kinds):
        return getitem_array_tuple(context, builder, sig, args)
    return _get(context, builder, sig, args[0], kinds, cgutils.unpack_tuple(builder, args[1], len(kinds)))


@lower_builtin(operator.setitem, Field, types.Any, types.Any)
def _set(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    field, value = sig.args[0], sig.args[2]
    index: Any = sig.args[1]
    kinds = list(getattr(index, "types", [index]))
    if len(kinds) != field.ndim or not all(isinstance(kind, types.Integer) for kind in kinds):
        return setitem_array(context, builder, sig, args)
    indices = cgutils.unpack_tuple(builder, args[1], len(kinds)) if isinstance(index, types.BaseTuple) else [args[1]]
    at = _element(context, builder, field, args[0], kinds, indices)
    builder.store(context.cast(builder, args[2], value, field.dtype), at)
    return None


ROW_WIDTHS = {"layers": len(LAYER), "transfers": len(TRANSFER), "kernels": len(KERNEL)}
