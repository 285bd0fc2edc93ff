"""Real weights of other families: published ones, and MiniLM written as DistilBERT, ELECTRA and RoBERTa."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from real_weights import fetched
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

TEXTS = [
    "A film about a long road.",
    "No.",
    "The band played on while the rain came down, and nobody in the square thought of going home before the last song.",
    "What the actors do with so little is a small wonder",
]


def agrees(folder: Path, head: str, batch: dict[str, Tensor]) -> Any:
    """Loaded by us as by transformers: the error rule; saved again bit by bit. Gives our model."""
    auto = T.AutoModel if head == "Model" else getattr(T, f"AutoModel{head}")
    theirs = auto.from_pretrained(folder).eval()
    ours = fastbert.load(folder, getattr(fastbert, f"Encoder{head}"))
    mask = batch["attention_mask"].bool()
    exact_model = copy.deepcopy(theirs).double()
    with torch.no_grad():
        found = [
            (out.last_hidden_state if head == "Model" else out.logits)[mask]
            for out in (ours(**batch), theirs(**batch), exact_model(**batch))
        ]
        assert_close(*found, factor=3.0)
        fastbert.accelerate(theirs, strict=True)
        out = theirs(**batch)
        assert_close((out.last_hidden_state if head == "Model" else out.logits)[mask], *found[1:], factor=3.0)
    return ours


def padded(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["distilbert", "electra", "roberta"])
def test_minilm_as_another_family(family: str, tmp_path: Path) -> None:
    """The same numbers in, the same embeddings out."""
    minilm = fetched("minilm")
    state, config = load_file(minilm / "model.safetensors"), json.loads((minilm / "config.json").read_text())
    types = state.pop("embeddings.token_type_embeddings.weight")
    state = {key: value for key, value in state.items() if not key.startswith(("pooler.", "embeddings.position_ids"))}
    positions = state["embeddings.position_embeddings.weight"]
    if family == "electra":
        config |= {"model_type": "electra", "architectures": ["ElectraModel"], "embedding_size": 384}
        state["embeddings.token_type_embeddings.weight"] = types
    elif family == "roberta":
        config |= {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1, "type_vocab_size": 1}
        config["max_position_embeddings"] += 2
        state["embeddings.token_type_embeddings.weight"] = types[:1].clone()
        state["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros(2, 384), positions])
    else:
        config = {
            "model_type": "distilbert",
            "architectures": ["DistilBertModel"],
            "dim": 384,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 1536,
            "max_position_embeddings": 512,
            "vocab_size": config["vocab_size"],
        }
        state["embeddings.position_embeddings.weight"] = positions + types[0]
        names = {
            "encoder.layer": "transformer.layer",
            "attention.self.query": "attention.q_lin",
            "attention.self.key": "attention.k_lin",
            "attention.self.value": "attention.v_lin",
            "attention.output.dense": "attention.out_lin",
            "attention.output.LayerNorm": "sa_layer_norm",
            "intermediate.dense": "ffn.lin1",
            "output.dense": "ffn.lin2",
            "output.LayerNorm": "output_layer_norm",
        }
        renamed = {}
        for key, value in state.items():
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            renamed[key] = value
        state = renamed
    folder = tmp_path / family
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("model.safetensors", "*.onnx"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    got, want = (fastbert.encode(TEXTS, model=one) for one in (folder, minilm))
    assert abs(got - want).max() < 2e-6
    model = fastbert.load(folder)
    fastbert.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    rows = [[101, 1037, 2143, 102], [101, 102], [101, *range(2000, 2040), 102]]
    agrees(folder, "Model", padded(rows, model.config.pad_token_id or 0))


def test_rxnmapper_is_an_albert() -> None:
    """Twelve layers of one group's weights, in a pickle of the old form."""
    rows = [[12, *range(20, 60), 13], [12, 30, 31, 13], [12]]
    ours = agrees(fetched("rxnmapper"), "ForMaskedLM", padded(rows, 0))
    assert len({id(layer) for layer in ours.bert.encoder.layer}) == 1


@pytest.mark.parametrize("chain", ["vh", "vl"])
def test_sapiens_is_a_roberta(chain: str, tmp_path: Path) -> None:
    """fairseq's checkpoint under transformers' names; it gives masked residues of an antibody back."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        path = fetched("sapiens") / f"checkpoint_{chain}.pt"
        given = torch.load(path, weights_only=True, map_location="cpu")["model"]
    names = {
        "decoder.sentence_encoder.embed_tokens": "roberta.embeddings.word_embeddings",
        "decoder.sentence_encoder.embed_positions": "roberta.embeddings.position_embeddings",
        "decoder.sentence_encoder.emb_layer_norm": "roberta.embeddings.LayerNorm",
        "decoder.sentence_encoder.layers": "roberta.encoder.layer",
        "self_attn_layer_norm": "attention.output.LayerNorm",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "output.LayerNorm",
        "decoder.lm_head": "lm_head",
    }
    state = {"roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, 128)}
    for key, value in given.items():
        if key in ("decoder.lm_head.weight", "decoder.version"):
            continue
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = value.float()
    config = {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 25,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 256,
        "max_position_embeddings": len(state["roberta.embeddings.position_embeddings.weight"]),
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    letters = ["<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>"]
    begin = {"vh": "EVQLVESGGGLVQPGGSLRLSCAASGFTFS", "vl": "DIQMTQSPSSLSASVGDRVTITCRASQGIS"}[chain]
    whole = [0, *map(letters.index, begin), 2]
    hidden = [token if i % 9 else letters.index("<mask>") for i, token in enumerate(whole)]
    hidden[0], hidden[-1] = 0, 2
    batch = padded([hidden, whole[:9]], 1)
    ours = agrees(tmp_path, "ForMaskedLM", batch)
    with torch.no_grad():
        found = ours(**batch).logits[0].argmax(-1).tolist()
    masked = [i for i, token in enumerate(hidden) if token == letters.index("<mask>")]
    right = sum(found[i] == whole[i] for i in masked)
    assert len(masked) == 3 and right >= 2


@pytest.mark.long
def test_mpnet_base(tmp_path: Path) -> None:
    """all-mpnet-base-v2: relative positions, its tokenizer and its folder; 400 MB are fetched."""
    whole = tmp_path / "whole.zip"
    with whole.open("wb") as file:
        for i in range(1, 6):
            file.write(fetched(f"mpnet_{i}").read_bytes())
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(tmp_path)
    folder = next(tmp_path.glob("*/modules.json")).parent
    library = pytest.importorskip("sentence_transformers", reason="it is the reference")
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    ours = fastbert.encode(TEXTS, model=folder)
    assert abs(ours - theirs).max() < 2e-6
    tokens = T.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    agrees(folder, "Model", {key: tokens[key] for key in ("input_ids", "attention_mask")})
