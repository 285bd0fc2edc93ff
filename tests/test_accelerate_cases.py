"""Bugs of other encoders, looked for in models that were given to `fastbert.accelerate`; see docs/reliability.md."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from adapted import Adapted
from test_accelerate import FAMILIES, IDS, MASKS, RIGHT, WHOLE, encoder_of, model_of, states
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastbert
from fastbert import accelerate, paths_taken, restore
from fastbert.errors import ArgumentError
from fastbert.families.accelerated import accelerated
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

TYPED = ["Bert", "Electra", "Albert"]
ROBERTAS = ["Roberta", "XLMRoberta", "Camembert"]
BY_ACTIVATION = {"DistilBert": "activation"}


def three(model: Any) -> tuple[Any, Any, Any]:
    """Accelerated, its own code, and that in float64."""
    return accelerate(copy.deepcopy(model)), model, copy.deepcopy(model).double()


# 6: positions and types after packing


def padded(model: Any, mask: Tensor) -> Tensor:
    """IDS with the padding token where the mask is 0: RoBERTa counts positions by it."""
    return IDS.masked_fill(mask == 0, model.config.pad_token_id)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("family", ROBERTAS)
def test_case_06_positions_begin_behind_the_padding_index(family: str, types: int, mask: str) -> None:
    model = model_of(family, type_vocab_size=types, max_position_embeddings=13)
    with torch.no_grad():  # as if trained: rows of positions that differ by more than rounding
        model.embeddings.position_embeddings.weight.mul_(10)
    ids, kept = padded(model, MASKS[mask]), MASKS[mask].bool()
    of = torch.randint(0, types, ids.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, plain, exact = (
            one(ids, attention_mask=MASKS[mask], token_type_ids=of).last_hidden_state[kept] for one in three(model)
        )
        assert_close(got, plain, exact, factor=3.0)
        rows = [ids[i][keep][None] for i, keep in enumerate(kept)]
        fast, types_of = accelerate(model), [of[i][keep][None] for i, keep in enumerate(kept)]
        alone = [fast(row, token_type_ids=one).last_hidden_state[0] for row, one in zip(rows, types_of, strict=True)]
    torch.testing.assert_close(torch.cat(alone), got, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("types", [1, 2, 3])
@pytest.mark.parametrize("family", TYPED)
def test_case_06_types_of_pairs_stay_with_their_tokens(family: str, types: int, tmp_path: Path) -> None:
    model = model_of(family, type_vocab_size=types)
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.mul_(10)
        of = torch.randint(0, types, IDS.shape, generator=torch.Generator().manual_seed(2))
        got, plain, exact = (states(one, RIGHT, token_type_ids=of) for one in three(model))
    assert_close(got, plain, exact, factor=3.0)
    if family == "Bert":
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            assert_close(states(fastbert.load(tmp_path), RIGHT, token_type_ids=of), plain, exact, factor=3.0)


def test_case_06_positions_relative_to_each_other_are_not_passed_over() -> None:
    """MPNet adds a bias of distances that every layer shares."""
    config = T.MPNetConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80)
    model = T.MPNetModel(config).eval()
    with torch.no_grad():
        model.encoder.relative_attention_bias.weight.normal_(std=2.0)
        ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(2))
        exact = copy.deepcopy(model).double()(ids).last_hidden_state
        plain = model(ids).last_hidden_state
        assert_close(accelerate(model, strict=True)(ids).last_hidden_state, plain, exact, factor=3.0)


# 7: activations


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Albert"])
def test_case_07_the_flavour_of_gelu_is_the_configs(family: str, activation: str) -> None:
    model = model_of(family, **{BY_ACTIVATION.get(family, "hidden_act"): activation})
    with torch.no_grad():
        got, plain, exact = map(states, three(model))
    assert_close(got, plain, exact, factor=3.0)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_case_07_an_activation_that_we_lack_is_refused(family: str) -> None:
    model = model_of(family, **{BY_ACTIVATION.get(family, "hidden_act"): "quick_gelu"})
    with pytest.raises(ArgumentError, match="hidden_act: got 'quick_gelu'"):
        accelerate(model)
    assert not list(accelerated(model))


# 23: what makes the host wait


class Reads(TorchFunctionMode):
    """Names what makes the host wait for a GPU: numbers of a tensor that Python gets."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_case_23_the_mask_is_read_once_and_nothing_else(family: str) -> None:
    """In the shape of a GPU's path: one read for the lengths, whatever the number of layers."""
    if family in WHOLE:
        pytest.skip("its model is its encoder, which takes ids")
    model = accelerate(model_of(family))
    encoder, forward = encoder_of(model)
    width = forward.ours.config.hidden_size if forward.family.entry is None else 16
    x, mask = torch.randn(3, 9, width), RIGHT[:, None, None].bool()
    with torch.no_grad(), fastbert.use_backend("native"):
        encoder(x, attention_mask=mask)
        with Reads() as reads:
            encoder(x, attention_mask=mask)
    assert reads.names.count("tolist") <= 2  # the mask, and where blocks of our CPU kernels begin
    assert reads.names.count("numpy") <= 1  # where sequences begin, looked at before our CPU kernels do; a GPU has none
    assert set(reads.names) <= {"tolist", "numpy"}


# 25: additive biases


def alibi(heads: int, width: int) -> Tensor:
    """Symmetric: -slope * |row - column|."""
    places = torch.arange(width, dtype=torch.float32)
    slopes = 0.5 ** torch.arange(1, heads + 1)
    return -slopes[:, None, None] * (places[:, None] - places).abs()


@pytest.mark.parametrize("shape", ["1, 1", "1, H", "B, 1", "B, H", "alibi"])
def test_case_25_an_additive_bias_of_any_shape_and_its_gradient(family: str, shape: str) -> None:
    if family in WHOLE:
        pytest.skip("its model is its encoder, which takes ids")
    if family == "DebertaV2":
        pytest.skip("its encoder takes no additive mask")
    model = model_of(family)
    generator = torch.Generator().manual_seed(3)
    batch, heads = 3 if "B" in shape else 1, 3 if "H" in shape else 1
    bias = torch.randn(batch, heads, 9, 9, generator=generator)  # 9: of no alignment
    bias = alibi(3, 9)[None] if shape == "alibi" else bias.masked_fill(bias > 1.5, -torch.inf)
    width = 16 if family == "Albert" else 48
    x, dout = torch.randn(3, 9, width, generator=generator), torch.randn(3, 9, 48, generator=generator)
    found = []
    for one in three(model):
        [encoder] = [part for name, part in one.named_children() if name in ("encoder", "transformer")]
        dtype = next(encoder.parameters()).dtype
        given, added = (leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, bias))
        out = encoder(given, attention_mask=added)[0]
        found.append((out.detach(), *torch.autograd.grad(out, (given, added), dout.to(dtype))))
    for what, got, plain, exact in zip(("out", "dx", "dbias"), *found, strict=True):
        assert_close(got, plain, exact, factor=3.0, what=what)


# 26: ONNX


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*legacy")
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "DistilBert", "Albert"])
def test_case_26_an_export_to_onnx_records_their_own_code(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="torch writes ONNX by it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")

    class States(nn.Module):
        def __init__(self, body: Any) -> None:
            super().__init__()
            self.body = body

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.body(ids, attention_mask=mask).last_hidden_state

    model = model_of(family, attn_implementation="eager")
    with torch.no_grad():
        want = model(IDS[:2, :6], attention_mask=RIGHT[:2, :6]).last_hidden_state
        accelerate(model)
        states(model)
        axes = {0: "batch", 1: "width"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                States(model),
                (IDS, RIGHT),
                str(tmp_path / "model.onnx"),
                input_names=["ids", "mask"],
                output_names=["states"],
                dynamic_axes={"ids": axes, "mask": axes},
                dynamo=False,
            )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [got] = session.run(None, {"ids": IDS[:2, :6].numpy(), "mask": RIGHT[:2, :6].numpy()})
    kept = RIGHT[:2, :6].bool()
    torch.testing.assert_close(torch.from_numpy(got)[kept], want[kept], atol=2e-5, rtol=2e-5)
    with torch.no_grad(), paths_taken() as taken:
        states(model)
    assert sum(taken.values()) > 0, "and afterwards it is accelerated as before"


# 28: fused queries, keys and values


def test_case_28_names_and_numbers_of_a_checkpoint_stay(family: str) -> None:
    model = model_of(family)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    accelerate(model)
    with torch.no_grad():
        states(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    other = {name: torch.randn_like(x) * 0.2 if x.is_floating_point() else x for name, x in before.items()}
    for assign in (False, True):
        model.load_state_dict({name: x.clone() for name, x in other.items()}, assign=assign)
        with torch.no_grad():
            assert all(torch.equal(x, other[name]) for name, x in model.state_dict().items())
            torch.testing.assert_close(states(model), states(restore(copy.deepcopy(model))), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_case_28_low_rank_adapters_of_queries_and_values_learn(family: str, when: str) -> None:
    model = model_of(family).requires_grad_(False)
    if when == "after":
        accelerate(model)
        with torch.no_grad():
            states(model)
    torch.manual_seed(4)
    for part in list(model.modules()):
        for name in (
            "query",
            "value",
            "q_lin",
            "v_lin",
            "q",
            "v",
            "Wqkv",
            "q_proj",
            "v_proj",
            "query_proj",
            "value_proj",
        ):
            if isinstance(getattr(part, name, None), nn.Linear):
                setattr(part, name, Adapted(getattr(part, name)))
    own = copy.deepcopy(restore(copy.deepcopy(model)))
    accelerate(model)
    dout = torch.randn(int(RIGHT.sum()), 48)
    found = []
    for one in (model, own, copy.deepcopy(own).double()):
        names, leaves = zip(*((name, x) for name, x in one.named_parameters() if x.requires_grad), strict=True)
        with paths_taken() as taken:
            out = states(one)
        assert (sum(taken.values()) > 0) == (one is model)
        assert {name.split(".")[-2] for name in names} == {"down", "up"}
        grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
        # all in one: of a bias of two numbers plain torch's error is chance
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert_close(*found, factor=3.0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_case_28_peft(when: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="its LoRA is meant; pip install peft runs this")
    model = model_of("Bert", "ForSequenceClassification")
    if when == "before":
        accelerate(model)
        model(IDS, attention_mask=RIGHT)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    )
    if when == "after":
        accelerate(lora)
    own = restore(copy.deepcopy(lora))
    with torch.no_grad(), paths_taken() as taken:
        got, want = (one(IDS, attention_mask=RIGHT).logits for one in (lora, own))
    assert sum(taken.values()) > 0
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    dout = torch.randn_like(want)
    for one in (lora, own):
        one(IDS, attention_mask=RIGHT).logits.backward(dout)
    for (name, x), y in zip(lora.named_parameters(), own.parameters(), strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-3, msg=name)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of("Bert", "ForSequenceClassification"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, attention_mask=RIGHT).logits, want, atol=2e-5, rtol=2e-5)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(IDS, attention_mask=RIGHT).logits, want, atol=2e-5, rtol=2e-5)


# 29: inputs that do not lie in order


def test_case_29_strided_transposed_and_expanded_inputs(family: str) -> None:
    generator = torch.Generator().manual_seed(5)
    width = model_of(family).get_input_embeddings().embedding_dim
    flat = torch.randn(3, 9, width, generator=generator)
    inputs = {
        "transposed": flat.transpose(0, 1).contiguous().transpose(0, 1),
        "dims outside": flat.transpose(1, 2).contiguous().transpose(1, 2),
        "every other row": torch.randn(3, 18, width, generator=generator)[:, ::2],
        "one row, repeated": flat[:1].expand(3, -1, -1),
        "one token, repeated": flat[:, :1].expand(-1, 9, -1),
        "unaligned": torch.randn(3 * 9 * width + 1, generator=generator)[1:].view(3, 9, width),
    }
    masks = {"sliced": torch.stack([RIGHT, 1 - RIGHT], dim=2)[..., 0], "repeated": RIGHT[1:2].expand(3, -1)}
    fast, own, exact = three(model_of(family))
    with torch.no_grad():
        for name, x in inputs.items():
            for mask in masks.values():
                kept = mask.bool()
                got, plain, wanted = (
                    one(inputs_embeds=x.to(next(one.parameters()).dtype), attention_mask=mask).last_hidden_state[kept]
                    for one in (fast, own, exact)
                )
                assert_close(got, plain, wanted, factor=3.0, what=name)
        ids = torch.stack([IDS, IDS + 1], dim=2)[..., 0]
        torch.testing.assert_close(
            fast(ids, attention_mask=RIGHT).last_hidden_state, fast(IDS, attention_mask=RIGHT).last_hidden_state
        )


# 33: one call


def bert_folder(folder: Path, kind: str, **changes: Any) -> Path:
    """A transformers checkpoint with a tokenizer of a few words."""
    words = tiny_bert.VOCABULARY
    model_of("Bert", kind, vocab_size=len(words), max_position_embeddings=48, **changes).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    T.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_case_33_one_call_on_a_sentence_transformer(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers", reason="its models are meant")
    texts = ["the film was fine", "a", "ada hopper met alan turing in paris , and the story was lovely ."]
    pairs = list(zip(texts, texts[::-1], strict=True))
    model = theirs.SentenceTransformer(str(bert_folder(tmp_path / "body", "Model")), device="cpu")
    scorer = theirs.CrossEncoder(str(bert_folder(tmp_path / "head", "ForSequenceClassification", num_labels=1)))
    for one, call in ((model, lambda: model.encode(texts)), (scorer, lambda: scorer.predict(pairs))):
        want = call()
        assert accelerate(one) is one
        with paths_taken() as taken:
            assert np.allclose(call(), want, atol=2e-5)
        assert sum(taken.values()) > 0
        restore(one)
        with paths_taken() as taken:
            assert np.array_equal(call(), want)
        assert not taken


def test_case_33_one_call_on_a_pipeline(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path, "ForTokenClassification", num_labels=3)
    tagger = T.pipeline("token-classification", model=str(folder), device="cpu")
    texts = ["the film was fine", "ada met alan in paris"]
    want = tagger(texts, batch_size=2)
    accelerate(tagger.model)
    with paths_taken() as taken:
        got = tagger(texts, batch_size=2)
    assert sum(taken.values()) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert [one["entity"] for one in ours] == [one["entity"] for one in theirs]
        assert np.allclose([one["score"] for one in ours], [one["score"] for one in theirs], atol=2e-5)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 5, "conv_groups": 4}], ids=str)
def test_a_deberta_with_a_convolution(changes: dict[str, Any]) -> None:
    """Its embeddings narrower too: forward, gradient, dropout, hooks, and the way back."""
    sizes = {"conv_kernel_size": 3, "conv_act": "gelu", "embedding_size": 24, **changes}
    model = model_of("DebertaV2", **sizes)
    own = copy.deepcopy(model)
    holes = RIGHT.clone()
    holes[0, 3:5] = 0
    accelerate(model, strict=True)
    for mask in (*MASKS.values(), holes):
        with torch.no_grad(), paths_taken() as taken:
            got, plain = states(model, mask), states(own, mask)
            assert sum(taken.values()) > 0
            assert_close(got, plain, states(copy.deepcopy(own).double(), mask), factor=3.0)
    for found in fastbert.verify(model):
        assert found.difference <= 3 * found.rounding + 1e-7, found
    encoder, forward = encoder_of(model.train())
    forward.ours.follow()
    assert forward.ours.layer[0].dropouts() == (0.1,) * 5 and len(forward.ours.layer[1].dropouts()) == 4
    model.eval()
    seen: list[torch.Size] = []
    handle = encoder.conv.conv.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    states(model)
    assert seen == [(3, 48, 9)]
    handle.remove()
    encoder.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(fastbert.errors.BackendError, match="a hook on a module that is never called by itself"):
        states(model)
    fastbert.restore(model)
    assert torch.equal(states(model), states(own))
