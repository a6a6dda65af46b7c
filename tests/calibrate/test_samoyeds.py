"""Sparse formats: the packed weight multiplies as its dense, masked twin does, and holds the bytes it should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moesim.calibrate.samoyeds import decode, encode, multiply, parse, prune_2_4  # noqa: E402
from moesim.costs.families import sparse_weight_bytes  # noqa: E402
from moesim.errors import CalibrationError  # noqa: E402

shapes = st.tuples(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 5), (2, 2), (4, 8)]),
    st.sampled_from([8, 16, 32, 128]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 2**31),
)


def drawn(shape):
    (n, m), v, blocks, stripes, tokens, seed = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(blocks * m, stripes * v, generator=generator)
    return n, m, v, weight, torch.randn(tokens, stripes * v, generator=generator), generator


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_multiplies_as_the_masked_dense_weight(shape):
    n, m, v, weight, x, _ = drawn(shape)
    encoded = encode(weight, n, m, v)
    masked = decode(encoded)
    exact = (x.double() @ masked.double().t()).float()
    assert torch.allclose(multiply(encoded, x), exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_keeps_the_largest_of_every_group(shape):
    """Kept values are the weight's own; n of m pieces per block survive, with two of every four values each."""
    n, m, v, weight, _, _ = drawn(shape)
    masked = decode(encode(weight, n, m, v))
    kept = masked != 0
    assert torch.equal(masked[kept], weight[kept])
    pieces = kept.view(-1, m, weight.shape[1] // v, v).any(-1).sum(1)
    assert (pieces == n).all()
    groups = kept.view(-1, 4)
    assert set(groups.sum(1).tolist()) <= {0, 2}
    lost = weight.abs().masked_fill(kept, -1).view(-1, 4).amax(1)
    least = weight.abs().masked_fill(~kept, float("inf")).view(-1, 4).amin(1)
    assert (lost <= least)[groups.any(1)].all()


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_selected_tokens_alone_are_computed(shape):
    n, m, v, weight, x, generator = drawn(shape)
    encoded = encode(weight, n, m, v)
    chosen = torch.randperm(len(x), generator=generator)[: max(1, len(x) // 2)]
    poisoned = torch.full_like(x, float("nan"))
    poisoned[chosen] = x[chosen]
    assert torch.allclose(multiply(encoded, poisoned, chosen), multiply(encoded, x[chosen]), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(["fp32", "fp16", "bf16"]))
def test_bytes_held_are_the_cost_models(shape, dtype):
    n, m, v, weight, _, _ = drawn(shape)
    weight = weight.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    rows, columns = weight.shape
    encoded = encode(weight, n, m, v)
    assert encoded.nbytes == sparse_weight_bytes(rows, columns, dtype, f"samoyeds-{n},{m},{v}")


def test_2_4_bytes_are_those_of_torchs_packed_form():
    """Values and metadata of the CUTLASS form, which torch can make without a GPU."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = prune_2_4(torch.randn(128, 256).half())
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    held = sum(part.numel() * part.element_size() for part in (values, metadata))
    assert held == sparse_weight_bytes(128, 256, "fp16", "2:4")
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, metadata), weight)


def test_a_quarter_remains_of_the_released_configuration():
    encoded = encode(torch.randn(256, 512).half(), 1, 2, 128)
    assert encoded.nbytes / (256 * 512 * 2) == pytest.approx(0.289, abs=0.001)  # 4.63 of 16 bits


@pytest.mark.parametrize(("n", "m", "v"), [(3, 2, 128), (1, 2, 6), (0, 2, 8), (1, 3, 128), (1, 2, 96)])
def test_blocks_that_do_not_fit_are_refused(n, m, v):
    with pytest.raises(CalibrationError, match=f"samoyeds-{n},{m},{v}"):
        encode(torch.randn(256, 256), n, m, v)


def test_names():
    assert parse("samoyeds-1,2,128") == (1, 2, 128)
    with pytest.raises(CalibrationError, match="known: 2:4"):
        parse("venom")
