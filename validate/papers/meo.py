"""MEO (arXiv 2310.09832): its text was not at hand; BERT-base with eight experts per layer, four of them used."""

from __future__ import annotations

from functools import cache

from moesim.model import Model
from moesim.question import Question, Scene, compose
from validate.papers.claim import Claim, Fact
from validate.papers.setup import plain

TOKENS = 128
ASSUMED = (
    f"BERT-base with 8 experts in every layer, 4 used (defaults of the released code), {TOKENS} tokens per sequence"
)


@cache
def bert() -> Model:
    """BERT-base (github.com/google-research/bert: 12 layers of 768, 12 heads, feed-forward 3072, 30,522 words)."""
    return Model(
        name="bert-base-8e", layers=12, moe_layers=tuple(range(12)), hidden=768, experts=8, top_k=4, expert_ffn=3072,
        shared_ffn=0, dense_ffn=0, heads=12, kv_heads=12, head_dim=64, vocab=30522, ffn_matrices=2,
        tied_embeddings=True, expert_bits=32, weight_bits=32,
    )  # fmt: skip


def operations(policy: str) -> float:
    """Multiplications and additions of one sequence: layers, attention in both directions, experts, merging."""
    served = bert()
    trace = plain(served, 1, TOKENS, 0)
    experts = Scene(trace, Question(model=served)).under(compose(policy)).trace.experts
    layers = served.layers * (served.attention_params(0) + served.router_params)
    attention = served.layers * 4 * TOKENS * TOKENS * served.heads * served.head_dim
    return 2.0 * TOKENS * layers + attention + 2.0 * served.expert_params * float((experts >= 0).sum())


CLAIMS = (
    Claim(
        "MEO",
        "operations of a sequence, four experts over one merged",
        72.0 / 28.6,
        (
            Fact("MEO", "flops", "BERT-type (unread)", "", "abstract", "vanilla MoE", 72.0),
            Fact("MEO", "flops", "BERT-type (unread)", "", "abstract (28.9 in another copy)", "MEO", 28.6),
        ),
        lambda: operations("all-resident") / operations("MEO"),
        kind="operations",
        main=True,
        assumed=ASSUMED,
    ),
)
