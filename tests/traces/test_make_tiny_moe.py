"""The training script on a few kilobytes of its own text, for a second."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.trace import DECODE, PREFILL, io
from moesim.trace.check import check

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "traces" / "make_tiny_moe.py"
TASKS = ("code", "prose")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_moe", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_moe"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty documents of numbers for each task, instead of the machine's files."""
    for task in TASKS:
        for i in range(20):
            lines = [f"{task} {i} line {j}: {i * j % 97}" for j in range(80)]
            (tmp_path / f"{i}.{task}").write_text("\n\n".join(lines))
    found = {task: ([str(tmp_path)], rf"\.{task}$") for task in TASKS}
    monkeypatch.setattr(script, "sources", lambda: found)
    monkeypatch.setattr(script, "LEAST_BYTES", 10_000)
    return tmp_path


def tiny(script: ModuleType) -> object:
    return script.Shape(layers=2, experts=4, hidden=16, heads=2, expert_hidden=8, window=64)


def test_smoke(script: ModuleType, text: Path, tmp_path: Path) -> None:
    trace = script.make(tiny(script), minutes=0.01, requests=4, seed=0, weights=tmp_path / "weights.pt")
    check(trace, "smoke")
    assert trace.info.model == "tiny-moe-2x4" and trace.info.moe_layers == (0, 1)
    assert trace.info.extra["training"]["steps"] > 0
    assert set(trace.info.extra["training"]["held_out_bits_per_byte"]) == set(TASKS)
    assert trace.requests.request_id == ("code-0000", "prose-0000", "code-0001", "prose-0001")
    assert trace.requests.task == ("code", "prose", "code", "prose")
    prompts = np.bincount(trace.request[trace.phase == PREFILL])
    outputs = np.bincount(trace.request[trace.phase == DECODE])
    np.testing.assert_array_equal(prompts, trace.requests.prompt_tokens)
    assert prompts.min() >= 48 and prompts.max() <= 160 and outputs.min() >= 40 and outputs.max() <= 120
    assert not (np.asarray(trace.probabilities, np.float64) * 1024 % 1).any()

    again = script.make(tiny(script), minutes=99, requests=4, seed=0, weights=tmp_path / "weights.pt")
    for array in ("experts", "weights", "probabilities", "position"):
        np.testing.assert_array_equal(getattr(again, array), getattr(trace, array))

    io.write(trace, tmp_path / "trace.parquet")
    assert io.read(tmp_path / "trace.parquet").info == trace.info


def test_one_pass_routes_as_token_by_token(script: ModuleType) -> None:
    """The KV cache and the n-gram context change nothing: recorded routing is that of one pass over all bytes."""
    from moesim.trace.capture import capture

    shape = tiny(script)
    model = script.build_model(shape, 0)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    routers = [layer["router"] for layer in model["layers"]]
    with torch.inference_mode(), capture(model, routers=routers) as recorder:
        with recorder.request("whole"):
            logits = script.forward(model, shape, tokens)[0]
        with recorder.request("steps"):
            past = None
            for end in range(8, 41):
                last, _, past = script.forward(model, shape, tokens[:, :end], past)
    trace = recorder.trace()
    torch.testing.assert_close(last[:, -1], logits[:, -1])
    np.testing.assert_array_equal(trace.experts[:40], trace.experts[40:])
    np.testing.assert_allclose(trace.probabilities[:40], trace.probabilities[40:], atol=1e-3)


def test_repeated_paragraphs_are_dropped(script: ModuleType, tmp_path: Path) -> None:
    licence = b"all rights reserved " * 30
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(licence + b"\n\n" + bytes([65 + i]) * 600)
    documents = script.read_documents([str(tmp_path)], r"\.txt$", np.random.default_rng(0))
    assert len(documents) == 3
    assert sum(licence in document for document in documents) == 1


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_is_refused(script: ModuleType, minutes: float) -> None:
    with pytest.raises(TraceError, match="must be above 0"):
        script.make(tiny(script), minutes=minutes, requests=1, seed=0)


def test_too_little_text_is_refused(script: ModuleType, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LEAST_BYTES", 10_000_000)
    with pytest.raises(TraceError, match=r"task 'code': \d+ bytes of text found.*install"):
        script.read_corpora(np.random.default_rng(0))
