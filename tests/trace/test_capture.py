"""Captured routing equals what an independent recomputation finds, on tiny random models."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.trace import DECODE, PREFILL, Trace
from moesim.trace.capture import capture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

EXPERTS, TOP_K, LAYERS = 8, 2, 3
PROMPT, NEW = 5, 4
COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 2.5,
}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
CLASSES = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 16, "norm_topk_prob": False},
    "Qwen3Moe": {**QWEN, "norm_topk_prob": True, "head_dim": 8},
    "Olmoe": {"num_experts": EXPERTS, "norm_topk_prob": False},
    "DeepseekV2": {**DEEPSEEK, "topk_method": "greedy"},
    "DeepseekV3": {**DEEPSEEK, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 16},
}
SIGMOID = {"DeepseekV3"}
RENORMALISED = {"Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"}


def build(name: str):
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **CLASSES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("gate.weight", "router.weight", "router.bias")):
                parameter.normal_()  # some classes start routers at zero, where every expert ties
            if key.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.3)  # so that choosing by the biased score differs from weighing by the other
    return model


def generate(model, prompt: int = PROMPT, new: int = NEW):
    ids = torch.arange(prompt)[None] + 3
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)


def recompute(name: str, model, tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts, weights, probabilities from the hidden states entering each MoE block, by the published rules."""
    states, handles = [], []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            handles.append(layer.mlp.register_forward_pre_hook(lambda _, args: states.append(args[0][0])))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    out = []
    for block, x in zip(blocks, states, strict=True):
        router = getattr(block, "gate", None) or block.router
        logits = x @ router.weight.T + getattr(router, "bias", 0.0)
        scores = logits.sigmoid() if name in SIGMOID else logits.softmax(-1)
        order = scores
        if name in SIGMOID:
            biased = scores + router.e_score_correction_bias
            groups = biased.view(len(x), 2, EXPERTS // 2).topk(2, -1).values.sum(-1).argmax(-1)
            outside = torch.arange(EXPERTS)[None] // (EXPERTS // 2) != groups[:, None]
            order = biased.masked_fill(outside, -torch.inf)
        ids = order.argsort(-1, descending=True)[:, :TOP_K]
        weights = scores.gather(1, ids)
        rank = weights.argsort(-1, descending=True)
        ids, weights = ids.gather(1, rank), weights.gather(1, rank)
        if name in RENORMALISED:
            weights = weights / weights.sum(-1, keepdim=True)
        out.append((ids, weights, scores / scores.sum(-1, keepdim=True)))
    return tuple(torch.stack(arrays, 1).detach().numpy() for arrays in zip(*out, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_hugging_face_class(name: str) -> None:
    model = build(name)
    with capture(model, name=name) as recorder:
        with recorder.request("a", task="qa"):
            tokens = generate(model)
        with recorder.request("b"), torch.no_grad():
            model(tokens[:, :6])
    trace = recorder.trace(sampling="greedy")

    fed = PROMPT + NEW - 1  # the last token is never fed back
    first = 1 if name.startswith("Deepseek") else 0
    assert trace.info.moe_layers == tuple(range(first, LAYERS))
    assert (trace.info.model, trace.info.experts, trace.top_k) == (name, EXPERTS, TOP_K)
    assert trace.info.engine.startswith("transformers ")
    assert trace.requests.request_id == ("a", "b") and trace.requests.task == ("qa", "")
    assert trace.phase.tolist() == [PREFILL] * PROMPT + [DECODE] * (NEW - 1) + [PREFILL] * 6
    assert trace.position.tolist() == [*range(fed), *range(6)]

    experts, weights, probabilities = recompute(name, model, tokens[:, :fed])
    np.testing.assert_array_equal(trace.experts[:fed], experts)
    np.testing.assert_array_equal(trace.experts[fed:], experts[:6])
    np.testing.assert_allclose(trace.weights[:fed], weights, atol=2e-3)
    np.testing.assert_allclose(trace.probabilities[:fed], probabilities, atol=2e-3)


def test_hooks_are_removed_and_outputs_unchanged() -> None:
    model = build("Mixtral")
    plain = generate(model)
    with capture(model) as recorder, recorder.request("a"):
        watched = generate(model)
    assert torch.equal(plain, watched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("loaded", "name"), [("", "MixtralForCausalLM"), ("org/model", "org/model"), ("/home/x/model", "model")]
)
def test_model_name(loaded: str, name: str) -> None:
    model = build("Mixtral")
    model.config.name_or_path = loaded
    with torch.no_grad(), capture(model) as recorder, recorder.request("a"):
        model(torch.ones(1, 4, dtype=torch.long))
    assert recorder.trace().info.model == name


def test_dense_model_is_refused() -> None:
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 1}))
    refusal = pytest.raises(TraceError, match=r"LlamaForCausalLM: no router found.*dense model has no routing")
    with refusal, capture(dense):
        pass


def test_batch_padding_and_missing_cache_are_refused() -> None:
    model = build("Mixtral")
    ids = torch.ones(2, 4, dtype=torch.long)
    with capture(model) as recorder:
        with pytest.raises(TraceError, match="batch of 2 sequences"), recorder.request("a"):
            model(ids)
        padded = torch.tensor([[0, 0, 1, 1]])
        with pytest.raises(TraceError, match="hides 2 of 4 tokens"), recorder.request("a"):
            model(ids[:1], attention_mask=padded)
        refusal = pytest.raises(TraceError, match=r"a pass of 5 tokens after the first.*use_cache=True")
        with refusal, recorder.request("a"):
            model.generate(ids[:1], max_new_tokens=3, use_cache=False)
        with pytest.raises(TraceError, match="nothing recorded"):
            recorder.trace()


def test_requests_frame_every_pass() -> None:
    model = build("Mixtral")
    ids = torch.ones(1, 4, dtype=torch.long)
    with capture(model) as recorder:
        with pytest.raises(TraceError, match="ran outside a request"):
            model(ids)
        refusal = pytest.raises(TraceError, match="request 'b' inside request 'a'")
        with refusal, recorder.request("a"), recorder.request("b"):
            pass
        with pytest.raises(TraceError, match="never called"), recorder.request("a"):
            pass
        for _ in range(2):
            with recorder.request("twice"):
                model(ids)
        with pytest.raises(TraceError, match="request_id 'twice'"):
            recorder.trace()


class Block(torch.nn.Module):
    """A residual mixture of `experts` scalars, with a linear router: enough to be watched."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.choose = torch.nn.Linear(width, experts)
        self.scale = torch.nn.Parameter(torch.randn(experts))

    def forward(self, x):
        return x + (self.choose(x).softmax(-1) @ self.scale)[..., None]


def plain_model(layers: int = 2, experts: int = 6):
    torch.manual_seed(1)
    return torch.nn.Sequential(*[Block(8, experts) for _ in range(layers)])


def run_plain(model, **options) -> Trace:
    torch.manual_seed(2)
    with torch.no_grad(), capture(model, **options) as recorder, recorder.request("a", task="x"):
        model(torch.randn(7, 8))
        model(torch.randn(1, 8))
    return recorder.trace()


def test_plain_module_with_bare_logits() -> None:
    model = plain_model()
    trace = run_plain(model, routers=[block.choose for block in model], top_k=3, name="plain")
    torch.manual_seed(2)
    x = torch.cat([torch.randn(7, 8), torch.randn(1, 8)])
    for layer, block in enumerate(model):
        probabilities = block.choose(x).softmax(-1).detach().numpy()
        ids = np.argsort(-probabilities, axis=-1)[:, :3]
        chosen = np.take_along_axis(probabilities, ids, -1)
        np.testing.assert_array_equal(trace.experts[:, layer], ids)
        np.testing.assert_allclose(trace.probabilities[:, layer], probabilities, atol=1e-3)
        np.testing.assert_allclose(trace.weights[:, layer], chosen / chosen.sum(-1, keepdims=True), atol=1e-3)
        x = block(x)
    assert trace.info.moe_layers == (0, 1) and trace.info.model == "plain"
    assert trace.requests.prompt_tokens.tolist() == [7] and trace.tokens == 8


def test_plain_module_options() -> None:
    model = plain_model()

    def is_router(name: str, module: torch.nn.Module) -> bool:
        return name.endswith("choose")

    shares = run_plain(model, routers=is_router, top_k=2)
    kept = run_plain(model, routers=is_router, top_k=2, renormalise=False, probabilities=False)
    assert kept.probabilities is None and shares.probabilities is not None
    np.testing.assert_array_equal(shares.experts, kept.experts)
    chosen = np.take_along_axis(shares.probabilities, shares.experts.astype(np.int64), -1)
    np.testing.assert_allclose(kept.weights, chosen, atol=1e-3)
    with pytest.raises(TraceError, match=r"returns logits of 6 experts.*top_k=\.\.\."):
        run_plain(model, routers=is_router)
    with pytest.raises(TraceError, match="top_k 7"):
        run_plain(model, routers=is_router, top_k=7)
    with pytest.raises(TraceError, match=r"float32 \[7, 8\]"):
        run_plain(torch.nn.Sequential(Strange()), routers=lambda name, module: isinstance(module, Strange))


class Strange(torch.nn.Module):
    def forward(self, x):
        return x, x


class Scored(torch.nn.Module):
    """A router in the form (logits, weights, ids), with weights from a function of the logits."""

    def __init__(self, function, top_k: int = 2) -> None:
        super().__init__()
        self.function, self.top_k = function, top_k

    def forward(self, x):
        weights, ids = self.function(x).topk(self.top_k, dim=-1)
        return x, weights, ids


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("function", [lambda x: x.softmax(-1), torch.sigmoid], ids=["softmax", "sigmoid"])
def test_scoring_is_found_from_the_weights(function, top_k: int) -> None:
    trace = run_plain(torch.nn.Sequential(Scored(function, top_k)), routers=lambda name, module: name == "0")
    torch.manual_seed(2)
    scores = function(torch.cat([torch.randn(7, 8), torch.randn(1, 8)])).numpy()
    np.testing.assert_allclose(trace.probabilities[:, 0], scores / scores.sum(-1, keepdims=True), atol=1e-3)
    assert (trace.weights.sum(-1) <= 1.01).all()


def test_unknown_scoring_is_refused_unless_probabilities_are_off() -> None:
    model = torch.nn.Sequential(Scored(lambda x: (3 * x).exp()))
    with pytest.raises(TraceError, match=r"weights follow none of softmax.*probabilities=False"):
        run_plain(model, routers=lambda name, module: name == "0")
    assert run_plain(model, routers=lambda name, module: name == "0", probabilities=False).probabilities is None


def test_importing_moesim_trace_loads_no_torch() -> None:
    code = "import sys, moesim, moesim.trace, moesim.trace.capture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
