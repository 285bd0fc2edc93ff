"""Checkpoints of models whose code is not in transformers: NomicBERT as nomic-ai has it, GTE-new and Jina v2.

Neither their code nor their weights are here. What they compute is written down below from text-embeddings-inference
(backends/candle/src/models/nomic.rs, gte.rs, jina.rs, src/layers/rotary.rs and src/alibi.rs), in plain torch over
tensors under the checkpoints' own keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_bert
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from fastbert.errors import CheckpointError
from fastbert.model.mapping import to_theirs
from fastbert.testing import assert_close

HIDDEN, HEADS, LAYERS, WORDS, LONGEST = 48, 3, 2, 70, 40
LENGTHS = (11, 4, 1)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 80,
    "max_position_embeddings": LONGEST,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
NOMIC = {
    "model_type": "nomic_bert",
    "vocab_size": WORDS - 3,  # rounded up
    "pad_vocab_size_multiple": 5,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": 200,  # rounded up
    "n_layer": LAYERS,
    "n_positions": LONGEST,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "prenorm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
}
NEW = {
    **SIZES,
    "model_type": "new",
    "hidden_act": "gelu",
    "position_embedding_type": "rope",
    "rope_theta": 500,
    "rope_scaling": {"type": "ntk", "factor": 2.0},
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "type_vocab_size": 0,
}
JINA = {
    **SIZES,
    "model_type": "bert",
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "emb_pooler": "mean",
    "type_vocab_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "nomic": NOMIC,
    "nomic with biases": {**NOMIC, "activation_function": "geglu", "qkv_proj_bias": True, "mlp_fc2_bias": True},
    "nomic with all biases": {
        **NOMIC,
        "activation_function": "geglu",
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
    },
    "gte": NEW,
    "gte multilingual": {**NEW, "rope_theta": 200, "rope_scaling": {"type": "ntk", "factor": 8}, "type_vocab_size": 1},
    "gte unscaled": {**NEW, "rope_scaling": None},
    "jina": JINA,
    "jina reglu": {**JINA, "feed_forward_type": "reglu"},
}


OF_BERT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DROPOUTS = {"nomic": ("resid_pdrop", "attn_pdrop"), "gte": OF_BERT, "jina": OF_BERT}


class Spelled(NamedTuple):
    """How a checkpoint names the parts of a model, and its classes."""

    classes: str
    prefix: str
    embeddings_norm: str
    layer: str
    qkv: tuple[str, ...]
    attention_output: str
    attention_norm: str
    up: tuple[str, ...]
    output: str
    output_norm: str


SPELLED = {
    "nomic": Spelled(
        "NomicBert", "bert.", "emb_ln", "encoder.layers.{}.", ("attn.Wqkv",), "attn.out_proj", "norm1",
        ("mlp.fc11", "mlp.fc12"), "mlp.fc2", "norm2",
    ),
    "gte": Spelled(
        "New", "new.", "embeddings.LayerNorm", "encoder.layer.{}.", ("attention.qkv_proj",), "attention.o_proj",
        "attn_ln", ("mlp.up_gate_proj",), "mlp.down_proj", "mlp_ln",
    ),
    "jina": Spelled(
        "JinaBert", "bert.", "embeddings.LayerNorm", "encoder.layer.{}.",
        ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
        "attention.output.LayerNorm", ("mlp.gated_layers",), "mlp.wo", "mlp.layernorm",
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def weights_of(name: str, head: str = "Model") -> dict[str, Tensor]:
    """Random tensors under the keys of the checkpoint."""
    spelled, config = SPELLED[name.split()[0]], CONFIGS[name]
    generator, state = torch.Generator().manual_seed(len(name)), dict[str, Tensor]()
    prefix = "" if head == "Model" else spelled.prefix

    def linear(key: str, outputs: int, inputs: int, bias: bool = True) -> None:
        state[f"{key}.weight"] = torch.randn(outputs, inputs, generator=generator) * 0.2
        if bias:
            state[f"{key}.bias"] = torch.randn(outputs, generator=generator) * 0.2

    def norm(key: str) -> None:
        state[f"{key}.weight"] = torch.randn(HIDDEN, generator=generator) * 0.2 + 1
        state[f"{key}.bias"] = torch.randn(HIDDEN, generator=generator) * 0.2

    is_nomic = name.startswith("nomic")
    inner = 256 if is_nomic else 80
    biases = {key: config.get(key, True) for key in ("qkv_proj_bias", "mlp_fc2_bias")}
    linear(f"{prefix}embeddings.word_embeddings", WORDS, HIDDEN, False)
    if config["type_vocab_size"]:
        linear(f"{prefix}embeddings.token_type_embeddings", config["type_vocab_size"], HIDDEN, False)
    norm(prefix + spelled.embeddings_norm)
    for i in range(LAYERS):
        layer = prefix + spelled.layer.format(i)
        for key in spelled.qkv:
            linear(layer + key, 3 * HIDDEN // len(spelled.qkv), HIDDEN, biases["qkv_proj_bias"])
        linear(layer + spelled.attention_output, HIDDEN, HIDDEN, biases["qkv_proj_bias"])
        norm(layer + spelled.attention_norm)
        for key in spelled.up:
            linear(layer + key, 2 * inner // len(spelled.up), HIDDEN, config.get("mlp_fc1_bias", False))
        linear(layer + spelled.output, HIDDEN, inner, biases["mlp_fc2_bias"])
        norm(layer + spelled.output_norm)
    if head == "ForSequenceClassification" or (head == "Model" and name.startswith("jina")):
        linear(f"{prefix}pooler.dense", HIDDEN, HIDDEN)
    if head in ("ForSequenceClassification", "ForTokenClassification"):
        linear("classifier", 2, HIDDEN)
    if head == "ForMaskedLM" and is_nomic:
        linear("cls.predictions.transform.dense", HIDDEN, HIDDEN, config["mlp_fc1_bias"])
        norm("cls.predictions.transform.layer_norm")
        state["cls.predictions.decoder.weight"] = state[f"{prefix}embeddings.word_embeddings.weight"].clone()
        if config["mlp_fc1_bias"]:
            state["cls.predictions.decoder.bias"] = torch.randn(WORDS, generator=generator)
    if head == "ForMaskedLM" and name.startswith("gte"):
        linear("lm_head.dense", HIDDEN, HIDDEN)
        norm("lm_head.norm")
        state["lm_head.decoder.weight"] = state[f"{prefix}embeddings.word_embeddings.weight"].clone()
        state["lm_head.decoder.bias"] = torch.randn(WORDS, generator=generator)
    if head == "ForMaskedLM" and name.startswith("jina"):
        linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
        norm("cls.predictions.transform.LayerNorm")
        state["cls.predictions.decoder.weight"] = state[f"{prefix}embeddings.word_embeddings.weight"].clone()
        state["cls.predictions.bias"] = torch.randn(WORDS, generator=generator)
    return state


def turned(x: Tensor, config: dict[str, Any]) -> Tensor:
    """`[batch, heads, seqlen, head_dim]` by rotary positions: layers/rotary.rs."""
    head_dim, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    scaling = config.get("rope_scaling") or {"factor": 1.0}
    base = config.get("rope_theta", config.get("rotary_emb_base")) * scaling["factor"]
    inv_freqs = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=wide) / head_dim)
    inv_freqs = inv_freqs / scaling["factor"] ** (2.0 / head_dim)
    freqs = torch.arange(x.shape[2], dtype=wide)[:, None] * inv_freqs
    cos, sin = (torch.cat([one, one], -1).to(x.dtype) for one in (freqs.cos(), freqs.sin()))
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


def alibi(seqlen: int, like: Tensor) -> Tensor:
    """`[heads, seqlen, seqlen]`: alibi.rs, for three heads: those of two, and the first of four."""
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=like.dtype)
    place = torch.arange(seqlen)
    return -slopes[:, None, None] * (place - place[:, None]).abs()


def computed(
    name: str, state: dict[str, Tensor], batch: dict[str, Tensor], head: str = "Model", layers: int = LAYERS
) -> Tensor:
    """Hidden states or logits, in the dtype of `state`, after so many layers."""
    spelled, config = SPELLED[name.split()[0]], CONFIGS[name]
    prefix = "" if head == "Model" else spelled.prefix

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, state[f"{key}.weight"], state.get(f"{key}.bias"))

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, [HIDDEN], state[f"{key}.weight"], state[f"{key}.bias"], 1e-12)

    mask = batch["attention_mask"].bool()
    x = state[f"{prefix}embeddings.word_embeddings.weight"][batch["input_ids"]]
    if config["type_vocab_size"]:
        types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
        x = x + state[f"{prefix}embeddings.token_type_embeddings.weight"][types]
    x = norm(x, prefix + spelled.embeddings_norm)
    for i in range(layers):
        layer = prefix + spelled.layer.format(i)
        qkv = torch.cat([linear(x, layer + key) for key in spelled.qkv], -1)
        query, key, value = qkv.unflatten(-1, (3, HEADS, HIDDEN // HEADS)).permute(2, 0, 3, 1, 4)
        if not name.startswith("jina"):
            query, key = turned(query, config), turned(key, config)
        scores = query @ key.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5
        if name.startswith("jina"):
            scores = scores + alibi(x.shape[1], scores)
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = norm(x + linear(context, layer + spelled.attention_output), layer + spelled.attention_norm)
        if name.startswith("nomic"):
            activation = F.silu if config["activation_function"] == "swiglu" else F.gelu
            wide = linear(x, f"{layer}mlp.fc11") * activation(linear(x, f"{layer}mlp.fc12"))
        elif name.startswith("gte"):
            up, gate = linear(x, f"{layer}mlp.up_gate_proj").chunk(2, -1)
            wide = up * F.gelu(gate)
        else:
            gate, other = linear(x, f"{layer}mlp.gated_layers").chunk(2, -1)
            wide = (F.gelu if config["feed_forward_type"] == "geglu" else F.relu)(gate) * other
        x = norm(x + linear(wide, layer + spelled.output), layer + spelled.output_norm)
    if head == "ForSequenceClassification":
        first = x[torch.arange(len(x)), mask.long().argmax(1)]
        return linear(linear(first, f"{prefix}pooler.dense").tanh(), "classifier")
    if head == "ForTokenClassification":
        return linear(x, "classifier")[mask]
    if head == "ForMaskedLM":
        dense, after = ("lm_head.dense", "lm_head.norm")
        if name.startswith("jina"):
            dense, after = "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"
        elif name.startswith("nomic"):
            dense, after = "cls.predictions.transform.dense", "cls.predictions.transform.layer_norm"
        activation = F.silu if config.get("activation_function") == "swiglu" else F.gelu
        made = norm(activation(linear(x, dense)), after)[mask]
        of_decoder = {"gte": "lm_head.decoder.bias", "jina": "cls.predictions.bias"}
        bias = state.get(of_decoder.get(name.split()[0], "cls.predictions.decoder.bias"))
        return F.linear(made, state[f"{prefix}embeddings.word_embeddings.weight"], bias)
    return x[mask]


def batch_of(side: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(5, WORDS, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def folder_of(name: str, folder: Path, head: str = "Model", **changes: Any) -> dict[str, Tensor]:
    """The folder of a checkpoint; its tensors."""
    state = weights_of(name, head)
    folder.mkdir(exist_ok=True)
    ending = "ForPreTraining" if (name.split()[0], head) == ("nomic", "ForMaskedLM") else head
    config = {"architectures": [SPELLED[name.split()[0]].classes + ending], **CONFIGS[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return state


def loaded(folder: Path, head: str = "Model", **options: Any) -> Any:
    return fastbert.load(folder, getattr(fastbert, f"Encoder{head}"), **options)


def output(model: Any, batch: dict[str, Tensor], head: str) -> Tensor:
    out, mask = model(**batch), batch["attention_mask"].bool()
    if head == "Model":
        return out.last_hidden_state[mask]
    return out.logits if head == "ForSequenceClassification" else out.logits[mask]


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


WITH_HEADS = [
    *((name, "Model") for name in CONFIGS),
    *((name, "ForSequenceClassification") for name in ("nomic", "gte", "jina")),
    *((name, "ForMaskedLM") for name in ("nomic", "nomic with all biases")),
    *((name, head) for name in ("gte", "jina") for head in ("ForMaskedLM", "ForTokenClassification")),
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "head"), WITH_HEADS)
def test_forward(name: str, head: str, side: str, tmp_path: Path) -> None:
    state, batch = folder_of(name, tmp_path, head), batch_of(side)
    with torch.no_grad():
        got = output(loaded(tmp_path, head), batch, head)
        plain, exact = (computed(name, cast(state, to), batch, head) for to in (torch.float32, torch.float64))
    assert_close(got, plain, exact, factor=3.0)


@pytest.mark.parametrize(("name", "head"), WITH_HEADS)
def test_gradients(name: str, head: str, tmp_path: Path) -> None:
    state, batch = folder_of(name, tmp_path, head), batch_of()
    ours = loaded(tmp_path, head)
    state = {key: tensor for key, tensor in state.items() if not key.endswith("decoder.weight")}
    dout = torch.randn(computed(name, state, batch, head).shape, generator=torch.Generator().manual_seed(2))

    def gradients(made: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = torch.autograd.grad(made, list(of.values()), dout.to(made.dtype), allow_unused=True)
        return {key: torch.zeros_like(of[key]) if grad is None else grad for key, grad in zip(of, grads, strict=True)}

    got = gradients(output(ours, batch, head), dict(ours.named_parameters()))
    leaves = [
        {key: tensor.to(to).requires_grad_() for key, tensor in state.items()} for to in (torch.float32, torch.float64)
    ]
    plain, exact = (gradients(computed(name, one, batch, head), one) for one in leaves)
    for key, grad in to_theirs(got, ours.origin.dialect.rules(ours)).items():
        if exact[key].abs().max() < 1e-12:  # that of a bias of keys, which softmax takes out again
            assert grad.abs().max() < 1e-5
        else:
            assert_close(grad, plain[key], exact[key], factor=3.0, what=key)


def test_half_types(name: str, tmp_path: Path) -> None:
    state, batch = cast(folder_of(name, tmp_path), torch.bfloat16), batch_of()
    with torch.no_grad():
        got = output(loaded(tmp_path, dtype=torch.bfloat16), batch, "Model")
        plain, exact = (computed(name, cast(state, to), batch) for to in (torch.bfloat16, torch.float64))
    assert_close(got, plain, exact, factor=3.0)


@pytest.mark.parametrize("by", ["ids", "embeddings"])
def test_hidden_states(name: str, by: str, tmp_path: Path) -> None:
    state, batch = folder_of(name, tmp_path), batch_of()
    model, mask = loaded(tmp_path), batch["attention_mask"].bool()
    given = dict(batch)
    if by == "embeddings":
        given["inputs_embeds"] = state["embeddings.word_embeddings.weight"][given.pop("input_ids")]
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert len(out.hidden_states) == LAYERS + 1
        for i, got in enumerate(out.hidden_states):
            plain, exact = (computed(name, cast(state, to), batch, layers=i) for to in (torch.float32, torch.float64))
            assert_close(got[mask], plain, exact, factor=3.0)
    with pytest.raises(fastbert.errors.ArgumentError, match="output_attentions"):
        model(**batch, output_attentions=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_alone_and_among_others(name: str, side: str, tmp_path: Path) -> None:
    """And each time the same to the bit."""
    folder_of(name, tmp_path)
    model, batch = loaded(tmp_path), batch_of(side)
    with torch.no_grad():
        together = output(model, batch, "Model")
        assert torch.equal(output(model, batch, "Model"), together)
        masks = batch["attention_mask"].bool()
        alone = [
            model(ids[mask][None]).last_hidden_state[0] for ids, mask in zip(batch["input_ids"], masks, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("name", "head"), [pair for pair in WITH_HEADS if pair[1] in ("ForMaskedLM", "Model")])
def test_steps_of_training(name: str, head: str, tmp_path: Path) -> None:
    """Those of plain torch, also with layers computed again in the backward pass; so saved, with what is tied."""
    state, batch = folder_of(name, tmp_path / "a", head), batch_of()
    ours = loaded(tmp_path / "a", head).train()
    body = ours if head == "Model" else ours.bert
    tied = {key for key in ("lm_head.decoder.weight", "cls.predictions.decoder.weight") if key in state}
    leaves = [
        {key: tensor.to(to, copy=True).requires_grad_() for key, tensor in state.items() if key not in tied}
        for to in (torch.float32, torch.float64)
    ]
    dout = torch.randn(computed(name, state, batch, head).shape, generator=torch.Generator().manual_seed(2))
    learned = [dict(ours.named_parameters()), *leaves]
    optimizers = [torch.optim.SGD(one.values(), lr=1e-3) for one in learned]
    for again in (False, True):
        for layer in body.encoder.layer:
            layer.gradient_checkpointing = again
        made = [output(ours, batch, head), *(computed(name, one, batch, head) for one in leaves)]
        for out, optimizer in zip(made, optimizers, strict=True):
            optimizer.zero_grad()
            out.backward(dout.to(out.dtype))
            optimizer.step()
    fastbert.save(ours, tmp_path / "b")
    after = load_file(tmp_path / "b" / "model.safetensors")
    plain, exact = leaves
    for key, tensor in exact.items():
        assert_close(after[key], plain[key], tensor, factor=3.0, what=key)
    [word] = [key for key in after if key.endswith("word_embeddings.weight")]
    assert not torch.allclose(after[word], state[word])
    assert all(torch.equal(after[key], after[word]) for key in tied)


def test_dropout_is_on_in_training(name: str, tmp_path: Path) -> None:
    """Of hidden states and of attention's weights, each by itself."""
    for field in DROPOUTS[name.split()[0]]:
        folder_of(name, tmp_path, **{field: 0.3})
        model, batch = loaded(tmp_path).train(), batch_of()
        assert not torch.equal(output(model, batch, "Model"), output(model, batch, "Model")), field
        assert torch.equal(output(model.eval(), batch, "Model"), output(model, batch, "Model"))


def test_token_types(tmp_path: Path) -> None:
    for name in ("nomic", "jina"):
        state, batch = folder_of(name, tmp_path), batch_of()
        batch["token_type_ids"] = torch.arange(11).gt(2).long().expand(3, 11)
        with torch.no_grad():
            got = output(loaded(tmp_path), batch, "Model")
            assert_close(
                got, computed(name, state, batch), computed(name, cast(state, torch.float64), batch), factor=3.0
            )


@pytest.mark.parametrize(("name", "head"), WITH_HEADS)
def test_saved_as_it_came(name: str, head: str, tmp_path: Path) -> None:
    state = folder_of(name, tmp_path / "a", head)
    fastbert.save(loaded(tmp_path / "a", head), tmp_path / "b")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    before, after = (json.loads((tmp_path / one / "config.json").read_text()) for one in "ab")
    assert before == after


def test_every_key_is_accounted_for(name: str, tmp_path: Path) -> None:
    state = folder_of(name, tmp_path)
    for key in (f"{SPELLED[name.split()[0]].layer.format(1)}{part}.weight" for part in SPELLED[name.split()[0]].up):
        save_file({one: tensor for one, tensor in state.items() if one != key}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="missing keys: encoder"):
            loaded(tmp_path)
        save_file({**state, key.replace(".1.", ".7."): state[key].clone()}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="1 unexpected keys: encoder"):
            loaded(tmp_path)


def test_too_long_a_text_is_an_error(name: str, tmp_path: Path) -> None:
    folder_of(name, tmp_path)
    model = loaded(tmp_path)
    model(torch.full((1, LONGEST), 7))
    with pytest.raises(fastbert.errors.ArgumentError, match=f"at most the model's {LONGEST} positions"):
        model(torch.full((1, LONGEST + 1), 7))


def test_nomic_is_as_long_as_its_base_is_one(tmp_path: Path) -> None:
    """With a scaling factor the base depends on the batch beyond the positions that it was trained for."""
    folder_of("nomic", tmp_path, rotary_scaling_factor=2, max_trained_positions=20)
    assert loaded(tmp_path).config.longest == 20


def test_embeddings_of_texts(name: str, tmp_path: Path) -> None:
    state = folder_of(name, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_bert.VOCABULARY) + "\n")
    texts = ["the plot was great", "a film", "very dull music and a weak story with ada hopper"]
    words = [["[CLS]", *text.split(), "[SEP]"] for text in texts]
    ids = [torch.tensor([tiny_bert.VOCABULARY.index(word) for word in text]) for text in words]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    batch = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    with torch.no_grad():
        hidden = computed(name, cast(state, torch.float64), batch)
    wanted = torch.stack([x.mean(0) for x in hidden.split(batch["attention_mask"].sum(1).tolist())])
    wanted = F.normalize(wanted, dim=1).float()
    for model in (tmp_path, fastbert.TextEncoder.from_folder(tmp_path)):
        got = fastbert.encode(texts, model, pooling="mean", normalize=True)
        torch.testing.assert_close(torch.as_tensor(got), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "after_gate", "after_output"), [("nomic", 0.0, 0.4), ("gte", 0.4, 0.4), ("jina", 0.4, 0.0)]
)
def test_dropouts_of_the_feed_forward(name: str, after_gate: float, after_output: float, tmp_path: Path) -> None:
    """NomicBERT drops what its last product gives, Jina v2 (as MosaicBERT) what its gate gives, and GTE-new both."""
    folder_of(name, tmp_path, hidden_dropout_prob=0.4, resid_pdrop=0.4)
    model = loaded(tmp_path).train()
    model.embeddings.eval()
    layer = model.encoder.layer[0]
    seen: dict[str, Tensor] = {}
    layer.output.dense.register_forward_hook(lambda _, args, out: seen.update(wide=args[0], made=out))
    layer.attention.output.LayerNorm.register_forward_hook(lambda _, args, out: seen.update(residual=out))
    layer.output.LayerNorm.register_forward_pre_hook(lambda _, args: seen.update(total=args[0]))
    torch.manual_seed(0)
    batch = batch_of()
    mask = batch["attention_mask"].bool()
    model(**batch)
    wide, made, residual, total = (seen[key][mask] for key in ("wide", "made", "residual", "total"))
    assert abs(float((wide == 0).double().mean()) - after_gate) < 0.03
    added = total - residual
    dropped = added.abs() < 1e-6
    assert abs(float(dropped.double().mean()) - after_output) < 0.05
    torch.testing.assert_close(added[~dropped], made[~dropped] / (1 - after_output), rtol=1e-4, atol=1e-5)


def test_a_loss_of_masked_tokens_without_a_bias(tmp_path: Path) -> None:
    state, batch = folder_of("nomic", tmp_path, "ForMaskedLM"), batch_of()
    mask = batch["attention_mask"].bool()
    labels = batch["input_ids"].where(mask & (torch.arange(11) % 2 == 0), -100)
    loss = loaded(tmp_path, "ForMaskedLM")(**batch, labels=labels).loss
    plain, exact = (
        F.cross_entropy(computed("nomic", cast(state, to), batch, "ForMaskedLM"), labels[mask])
        for to in (torch.float32, torch.float64)
    )
    assert_close(loss, plain, exact, factor=3.0)


def test_dropout_before_the_classifier_of_nomic(tmp_path: Path) -> None:
    """Its code takes that of embeddings, which it reads for nothing else, where the file names none."""
    for given, wanted in (({}, 0.0), ({"embd_pdrop": 0.3}, 0.3), ({"embd_pdrop": 0.3, "classifier_dropout": 0.2}, 0.2)):
        folder_of("nomic", tmp_path, "ForSequenceClassification", **given)
        assert loaded(tmp_path, "ForSequenceClassification").head_config.classifier_dropout == wanted


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("nomic", "prenorm", True),
        ("nomic", "rotary_emb_fraction", 0.5),
        ("nomic", "rotary_emb_fraction", None),
        ("nomic", "rotary_emb_interleaved", True),
        ("nomic", "rotary_emb_scale_base", 512),
        ("nomic", "moe_every_n_layers", 2),
        ("nomic", "activation_function", "gelu"),
        ("nomic", "n_inner", None),
        ("gte", "logn_attention_scale", True),
        ("gte", "pack_qkv", False),
        ("gte", "layer_norm_type", "rms_norm"),
        ("gte", "position_embedding_type", "absolute"),
        ("gte", "rope_scaling", {"type": "ntk", "factor": 2, "mixed_b": 0.6}),
        ("gte", "rope_scaling", {"type": "ntk", "factor": 0.5}),
        ("gte", "rope_scaling", {"type": "yarn", "factor": 2}),
        ("jina", "feed_forward_type", "original"),
        ("jina", "auto_map", {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}),
    ],
)
def test_what_is_refused_by_name(name: str, field: str, value: Any, tmp_path: Path) -> None:
    folder_of(name, tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=field.replace("rope_scaling", "rope_")):
        loaded(tmp_path)
