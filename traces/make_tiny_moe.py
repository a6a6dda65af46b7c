"""Train a small MoE language model on text found on this machine and record its routing as a trace.

    python traces/make_tiny_moe.py -o traces/tiny-moe-8x16.parquet

Needs numpy, torch and moesim; half an hour on one CPU thread. The trace holds no text. tiny-moe-8x16.md describes
the shipped file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import MoesimError, TraceError
from moesim.trace import Trace

CORPUS_BYTES = 6_000_000  # per task
LEAST_BYTES = 300_000  # a task with less cannot be learnt
DOCUMENT_BYTES = 24_000  # longer documents are cut, so that a few giants do not stand for a task
PARAGRAPH_BYTES = 80  # repeated paragraphs from this size on are dropped (licence texts recur)
HELD_OUT = 10  # every tenth document is held out
NGRAM_ROWS = 16_384
PROMPT_BYTES, OUTPUT_BYTES = (48, 161), (40, 121)  # least, and one more than the most
TEMPERATURE = 0.8
BALANCE = 0.003  # weight of each layer's load-balance loss
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class Shape:
    layers: int = 8
    experts: int = 16
    top_k: int = 2
    hidden: int = 128
    heads: int = 4
    expert_hidden: int = 192
    window: int = 288  # longest sequence trained on, bytes


def sources() -> dict[str, tuple[list[str], str]]:
    """Task -> folders to search and the pattern of paths that count; header stands in where manuals are missing."""
    paths = sysconfig.get_paths()
    packages = [paths["purelib"], paths["platlib"]]
    return {
        "code": ([paths["stdlib"]], r"\.py$"),
        "prose": (["/usr/share", *packages], r"(?i)/(readme|licen[cs]e|copying|copyright|notice|authors)[^/]*$"),
        "markup": (["/usr/share", *packages], r"\.(html?|xml|svg|css|rst)$"),
        "manual": (["/usr/share/man"], r"/man/man\d/[^/]+\.gz$"),
        "header": (["/usr/include", paths["include"]], r"\.h$"),
    }


def find_files(folders: list[str], pattern: str) -> Iterator[str]:
    """Regular files in a fixed order. Links are not followed: some trees under /usr contain loops."""
    for root in dict.fromkeys(folders):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if re.search(pattern, path) and not os.path.islink(path):
                    yield path


def read_text(path: str) -> bytes:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read(DOCUMENT_BYTES)
    except (OSError, EOFError):
        return b""


def read_documents(folders: list[str], pattern: str, rng: np.random.Generator) -> list[bytes]:
    """Documents in random order up to CORPUS_BYTES, without paragraphs that an earlier document had."""
    files = list(find_files(folders, pattern))
    seen: set[bytes] = set()
    documents, total = [], 0
    for index in rng.permutation(len(files)):
        kept = []
        for paragraph in read_text(files[index]).replace(b"\0", b"").split(b"\n\n"):
            digest = hashlib.sha1(b" ".join(paragraph.split())).digest()
            if len(paragraph) < PARAGRAPH_BYTES or digest not in seen:
                kept.append(paragraph)
                seen.add(digest)
        text = b"\n\n".join(kept)
        if len(text) >= 500:
            documents.append(text)
            total += len(text)
        if total >= CORPUS_BYTES:
            break
    return documents


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray  # uint8, documents joined by a zero byte
    held_out: list[bytes]


def read_corpora(rng: np.random.Generator) -> dict[str, Corpus]:
    """Four tasks: code, prose, markup, and manual (or header, where a machine has no manuals)."""
    corpora: dict[str, Corpus] = {}
    for task, (folders, pattern) in sources().items():
        if task == "header" and "manual" in corpora:
            continue
        documents = read_documents(folders, pattern, rng)
        size = sum(map(len, documents))
        if size < LEAST_BYTES and task != "manual":
            raise TraceError(
                f"task '{task}': {size} bytes of text found under {', '.join(folders)}, but at least {LEAST_BYTES} "
                f"are needed; install packages that bring such files (for markup and manuals: any *-doc package)"
            )
        if size >= LEAST_BYTES:
            train = b"\0".join(text for i, text in enumerate(documents) if i % HELD_OUT)
            corpora[task] = Corpus(np.frombuffer(train, dtype=np.uint8), documents[::HELD_OUT])
    return corpora


def build_model(shape: Shape, seed: int) -> Any:
    """The parameters, as torch modules; `forward` uses them."""
    import torch
    from torch import nn

    class Router(nn.Module):
        """Softmax over all experts, then the top k, renormalised: (logits, weights, experts) by rank."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = self.gate(x)
            weights, experts = logits.softmax(-1).topk(shape.top_k, dim=-1)
            return logits, weights / weights.sum(-1, keepdim=True), experts

    def layer() -> nn.ModuleDict:
        d, width = shape.hidden, shape.expert_hidden
        experts = nn.ParameterDict(
            {
                "up": nn.Parameter(torch.empty(shape.experts, d, 2 * width)),  # gate and up matrices side by side
                "down": nn.Parameter(torch.empty(shape.experts, width, d)),
            }
        )
        modules = {"qkv": nn.Linear(d, 3 * d, bias=False), "out": nn.Linear(d, d, bias=False), "router": Router()}
        return nn.ModuleDict({**modules, "norm1": nn.RMSNorm(d), "norm2": nn.RMSNorm(d), "experts": experts})

    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "bytes": nn.Embedding(256, shape.hidden),
            "ngrams": nn.Embedding(2 * NGRAM_ROWS, shape.hidden),
            "layers": nn.ModuleList([layer() for _ in range(shape.layers)]),
            "norm": nn.RMSNorm(shape.hidden),
        }
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            into_stream = name.endswith(("out.weight", "down"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if into_stream else 0.02)
    return model


def embed(model: Any, tokens: Any) -> Any:
    """Byte, hashed byte-pair and hashed byte-triple embeddings, summed: [batch, tokens, hidden]."""
    import torch.nn.functional as F

    one, two = F.pad(tokens, (1, 0))[:, :-1], F.pad(tokens, (2, 0))[:, :-2]
    pairs = (tokens * 31_337 + one * 7_919) % NGRAM_ROWS
    triples = (tokens * 1_009 + one * 92_821 + two * 48_611) % NGRAM_ROWS + NGRAM_ROWS
    return model["bytes"](tokens) + model["ngrams"](pairs) + model["ngrams"](triples)


def rotate(x: Any, start: int) -> Any:
    """Rotary position embedding of x [batch, heads, tokens, width], the first token at position `start`."""
    import torch

    half = x.shape[-1] // 2
    angle = torch.arange(start, start + x.shape[2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], -1)


def attend(layer: Any, x: Any, heads: int, past: Any, start: int) -> tuple[Any, Any]:
    """Causal attention over `past` (keys, values) and x; returns the output and the extended past."""
    import torch
    import torch.nn.functional as F

    batch, tokens, hidden = x.shape
    q, k, v = layer["qkv"](x).view(batch, tokens, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, start), rotate(k, start)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
    return layer["out"](y.transpose(1, 2).reshape(batch, tokens, hidden)), (k, v)


def mix_experts(layer: Any, x: Any) -> tuple[Any, Any]:
    """Routed experts of x [tokens, hidden]: weighted sum and load-balance loss (Switch Transformer, eq. 4)."""
    import torch
    import torch.nn.functional as F

    logits, weights, ids = layer["router"](x)
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[-1])
    rows = order // ids.shape[-1]
    outputs, start = [], 0
    grouped = x[rows]
    # NOTE: unbind, for its gradient is stacked once; indexing would fill and add a whole [experts, ...] each time.
    matrices = zip(counts.tolist(), layer["experts"]["up"].unbind(), layer["experts"]["down"].unbind(), strict=True)
    for count, up_matrix, down_matrix in matrices:
        if count:
            gate, up = (grouped[start : start + count] @ up_matrix).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ down_matrix)
            start += count
    mixed = torch.zeros_like(x).index_add(0, rows, torch.cat(outputs) * weights.flatten()[order][:, None])
    share = counts / counts.sum()
    return mixed, len(counts) * (share * logits.softmax(-1).mean(0)).sum()


def forward(model: Any, shape: Shape, tokens: Any, past: list[Any] | None = None) -> tuple[Any, Any, list[Any]]:
    """Logits of the tokens not in `past`, summed load-balance loss, new past. tokens [batch, whole sequence]."""
    start = past[0][0].shape[2] if past else 0
    context = max(start - 2, 0)  # the n-gram embedding looks two bytes back
    x = embed(model, tokens[:, context:])[:, start - context :]
    balance: Any = 0.0
    new_past = []
    for i, layer in enumerate(model["layers"]):
        y, kv = attend(layer, layer["norm1"](x), shape.heads, past[i] if past else None, start)
        new_past.append(kv)
        x = x + y
        mixed, loss = mix_experts(layer, layer["norm2"](x).flatten(0, 1))
        x = x + mixed.view_as(x)
        balance = balance + loss
    return model["norm"](x) @ model["bytes"].weight.T, balance, new_past


def draw_windows(text: np.ndarray, count: int, window: int, rng: np.random.Generator) -> Any:
    """[count, window + 1] byte windows at random places."""
    import torch

    starts = rng.integers(0, len(text) - window - 1, size=count)
    return torch.from_numpy(text[starts[:, None] + np.arange(window + 1)].astype(np.int64))


def cross_entropy(model: Any, shape: Shape, windows: Any) -> tuple[Any, Any]:
    import torch.nn.functional as F

    logits, balance, _ = forward(model, shape, windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), balance


def held_out_loss(model: Any, shape: Shape, corpora: dict[str, Corpus], windows: int = 32) -> dict[str, float]:
    """Bits per byte of each task on the same windows of held-out documents at every call."""
    import torch

    out = {}
    with torch.no_grad():
        for task, corpus in corpora.items():
            text = np.frombuffer(b"\0".join(corpus.held_out), dtype=np.uint8)
            drawn = draw_windows(text, windows, shape.window, np.random.default_rng(1))
            out[task] = round(cross_entropy(model, shape, drawn)[0].item() / math.log(2), 3)
    return out


def train(model: Any, shape: Shape, corpora: dict[str, Corpus], minutes: float, rng: np.random.Generator) -> dict:
    """Train for a time, with two windows of each task in a batch; returns what was done."""
    import torch

    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    began, processor, step, running, reported = time.monotonic(), time.process_time(), 0, 8.0, 0.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * done)))
        windows = torch.cat([draw_windows(c.train, 2, shape.window, rng) for c in corpora.values()])
        loss, balance = cross_entropy(model, shape, windows)
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += 0.02 * (loss.item() / math.log(2) - running)
        if done - reported > 0.05:
            reported = done
            skew = balance.item() / shape.layers
            print(f"{done:4.0%} step {step} train {running:.3f} bits per byte, balance {skew:.3f}", flush=True)
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "cpu_minutes": round((time.process_time() - processor) / 60, 2),
        "steps": step,
        "bytes_seen": step * windows[:, 1:].numel(),
        "train_bits_per_byte": round(running, 3),
        "held_out_bits_per_byte": held_out_loss(model, shape, corpora),
    }


def generate(model: Any, shape: Shape, prompt: bytes, outputs: int, generator: Any) -> None:
    """One pass over the prompt, then `outputs` sampled bytes fed back one at a time (temperature TEMPERATURE)."""
    import torch

    tokens = torch.tensor([list(prompt)])
    logits, _, past = forward(model, shape, tokens)
    for _ in range(outputs):
        chances = (logits[0, -1] / TEMPERATURE).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)[None]], 1)
        logits, _, past = forward(model, shape, tokens, past)


def record(model: Any, shape: Shape, corpora: dict[str, Corpus], requests: int, seed: int) -> Trace:
    """Routing of `requests` generations from held-out prompts, the tasks in turn."""
    import torch

    from moesim.trace.capture import capture

    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    routers = [layer["router"] for layer in model["layers"]]
    tasks = list(corpora)
    with torch.inference_mode(), capture(model, routers=routers, name=name_of(shape)) as recorder:
        for i in range(requests):
            task = tasks[i % len(tasks)]
            documents = corpora[task].held_out
            document = documents[rng.integers(len(documents))]
            length, outputs = rng.integers(*PROMPT_BYTES), rng.integers(*OUTPUT_BYTES)
            start = rng.integers(len(document) - length)
            with recorder.request(f"{task}-{i // len(tasks):04}", task=task):
                generate(model, shape, document[start : start + length], outputs, generator)
    trace = recorder.trace(sampling=f"temperature {TEMPERATURE}, seed {seed}", source="traces/make_tiny_moe.py")
    return coarsen(trace)


def coarsen(trace: Trace) -> Trace:
    """Weights and probabilities in steps of 1/1024, of which float16 holds each exactly: they compress far better."""
    assert trace.weights is not None and trace.probabilities is not None
    grid = [np.round(values * np.float32(1024)) / 1024 for values in (trace.weights, trace.probabilities)]
    return replace(trace, weights=grid[0].astype(np.float16), probabilities=grid[1].astype(np.float16))


def name_of(shape: Shape) -> str:
    return f"tiny-moe-{shape.layers}x{shape.experts}"


def make(shape: Shape, minutes: float, requests: int, seed: int, weights: Path | None = None) -> Trace:
    """Train (or load `weights`, if the file is there; else save them to it) and record."""
    import torch

    if not minutes > 0:
        raise TraceError(f"--minutes {minutes}; must be above 0: half an hour makes a model worth recording")
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    corpora = read_corpora(rng)
    for task, corpus in corpora.items():
        held_out = sum(map(len, corpus.held_out))
        print(f"{task}: {len(corpus.train)} bytes to train on, {len(corpus.held_out)} documents ({held_out}) held out")
    model = build_model(shape, seed)
    if weights and weights.exists():
        saved = torch.load(weights, weights_only=True)
        model.load_state_dict(saved["model"])
        training = saved["training"]
    else:
        training = {"parameters": sum(p.numel() for p in model.parameters()), "seed": seed}
        training |= train(model, shape, corpora, minutes, rng)
        if weights:
            torch.save({"model": model.state_dict(), "training": training}, weights)
    print(training)
    trace = record(model, shape, corpora, requests, seed)
    return replace(trace, info=replace(trace.info, extra={"shape": asdict(shape), "training": training}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="trace to write (.parquet)")
    parser.add_argument("--minutes", type=float, default=33, help="of training (default 33)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--requests", type=int, default=336, help="to record (default 336)")
    parser.add_argument("--weights", type=Path, help="trained model: loaded if the file is there, else written")
    arguments = parser.parse_args()
    shape = Shape(layers=arguments.layers, experts=arguments.experts)
    try:
        trace = make(shape, arguments.minutes, arguments.requests, arguments.seed, arguments.weights)
    except MoesimError as error:
        parser.exit(2, f"{error}\n")
    from moesim.trace.io import write

    write(trace, arguments.output)
    print(f"{arguments.output}: {trace.tokens} tokens of {len(trace.requests)} requests")


if __name__ == "__main__":
    main()
