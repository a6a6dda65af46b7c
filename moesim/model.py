"""Models by name or file: the catalogue in `data/`, Hugging Face config.json, and GGUF headers."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path

from moesim.architecture import MLA, Model, TensorBytes
from moesim.errors import ModelError, nearest
from moesim.model_files.gguf_model import read_gguf
from moesim.model_files.hf_config import read_config

__all__ = ["MLA", "Model", "TensorBytes", "catalogue", "load_model"]

DATA = Path(__file__).parent / "data"


def load_model(spec: str) -> Model:
    """The model a user means: a catalogue name, a config.json, a directory holding one, or a .gguf file.

    Names ignore case and may leave out the publisher and the tail: `mixtral-8x7b` is
    `mistralai/Mixtral-8x7B-v0.1`. A name goes before a directory called the same; write `./name` for the directory.
    """
    path = Path(spec.strip() or "unnamed")
    if path.suffix.lower() == ".gguf":
        return read_gguf(path)
    if path.suffix.lower() == ".json":
        return read_config(path)
    name = _match(spec)
    if name is not None:
        return _load_named(name)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(f"{path}: a directory without a config.json; copy the model's config.json into it")
        return read_config(config)
    known = [known.rpartition("/")[2] for known in catalogue()]
    raise ModelError(
        f"unknown model '{spec}': no catalogue name, no config.json, no directory, no .gguf file"
        + nearest(spec.rpartition("/")[2], known)
    )


def catalogue() -> list[str]:
    """Every name `load_model` knows, in the order of the catalogue; `data/*.json` configs follow."""
    return [*_rows(), *(file.stem for file in _configs())]


@cache
def _rows() -> dict[str, dict[str, str]]:
    """The rows of models.csv by name."""
    with (DATA / "models.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def _configs() -> list[Path]:
    return sorted(DATA.glob("*.json"))


@cache
def _spellings() -> dict[str, str]:
    """Lower-case spelling to catalogue name: the full id, its last part, and the aliases likewise."""
    known = {}
    for name in catalogue():
        aliases = _rows().get(name, {}).get("aliases", "")
        for spelling in (name, *filter(None, aliases.split(";"))):
            for form in (spelling, spelling.rpartition("/")[2]):
                known[form.lower()] = name
    return known


def _match(spec: str) -> str | None:
    """The catalogue name meant by a spelling or by the beginning of exactly one; ModelError when it fits several."""
    known, wanted = _spellings(), spec.strip().lower()
    if wanted in known:
        return known[wanted]
    fits = {name for spelling, name in known.items() if wanted and spelling.startswith((wanted + "-", wanted + "."))}
    if len(fits) > 1:
        raise ModelError(f"model '{spec}' may be {', '.join(sorted(fits))}; write more of its name")
    return fits.pop() if fits else None


def _load_named(name: str) -> Model:
    row = _rows().get(name)
    if row is not None:
        return _from_row(row)
    return replace(read_config(DATA / f"{name}.json"), source=f"{name}.json, shipped with moesim")


def _from_row(row: dict[str, str]) -> Model:
    layers = int(row["layers"])
    mla = row["mla"]
    return Model(
        name=row["name"],
        layers=layers,
        moe_layers=_layer_set(row["moe_layers"], layers) or (),
        hidden=int(row["hidden"]),
        experts=int(row["experts"]),
        top_k=int(row["top_k"]),
        expert_ffn=int(row["expert_ffn"]),
        shared_ffn=int(row["shared_ffn"]),
        dense_ffn=int(row["dense_ffn"]),
        heads=int(row["heads"]),
        kv_heads=int(row["kv_heads"]),
        head_dim=int(row["head_dim"]),
        vocab=int(row["vocab"]),
        ffn_matrices=int(row["ffn_matrices"]),
        mla=MLA(*map(int, mla.split("/"))) if mla else None,
        tied_embeddings=row["tied_embeddings"] == "yes",
        sliding_window=int(row["sliding_window"] or 0),
        sliding_layers=_layer_set(row["sliding_layers"], layers) or (),
        attention_layers=_layer_set(row["attention_layers"], layers),
        expert_bits=float(row["expert_bits"]),
        weight_bits=float(row["weight_bits"]),
        embedding_bits=float(row["embedding_bits"]),
        kv_bits=float(row["kv_bits"]),
        extra_params=int(row["extra_params"] or 0),
        state_bytes=int(row["state_bytes"] or 0),
        source="; ".join(filter(None, (row["source"], row["note"]))),
    )


def _layer_set(text: str, layers: int) -> tuple[int, ...] | None:
    """`0-31`, every second `1-31:2`, all others `not 3-47:4`; `all` is None."""
    if text == "all":
        return None
    if text.startswith("not "):
        rest = set(_layer_set(text[4:], layers) or ())
        return tuple(i for i in range(layers) if i not in rest)
    if not text:
        return ()
    span, _, step = text.partition(":")
    first, _, last = span.partition("-")
    return tuple(range(int(first), int(last or first) + 1, int(step or 1)))
