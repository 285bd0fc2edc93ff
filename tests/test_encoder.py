"""The encoder: against transformers' own, as a drop-in inside its BertModel, and alone."""

import copy
from contextlib import contextmanager

import pytest
import stand_in
import torch

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.families.quantization import quantize
from fastbert.model.encoder import Encoder
from fastbert.packing import Packing
from fastbert.testing import assert_close

transformers = pytest.importorskip("transformers", reason="compares with transformers' BertModel")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
RIGHT = [[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2]
LEFT = [row[::-1] for row in RIGHT]
HOLES = [[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 1] * 4 + [0], [1] * 9]


def hf_bert(attention="sdpa", seed=0, **changes):
    """A transformers BertModel whose weights, biases and LayerNorms are all random."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**(SMALL | changes), attn_implementation=attention)
    with skip_what_transformers_refuses():
        model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "LayerNorm" in name else 0.15))
            if "LayerNorm.weight" in name:
                parameter.add_(1.0)
    return model


@contextmanager
def skip_what_transformers_refuses():
    """Version 4 knows fewer attention settings and mask forms than version 5."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"transformers {transformers.__version__} refuses it: {error}")


def with_our_encoder(model):
    ours = copy.deepcopy(model)
    ours.encoder = Encoder.from_hf(model.encoder)
    return ours


def inputs(generator, mask=RIGHT):
    ids = torch.randint(1, 99, (3, 9), generator=generator)
    types = torch.randint(0, 2, (3, 9), generator=generator)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_case_03_drop_in_for_every_attention_setting(attention, mask, path, generator):
    if attention == "flex_attention" and stand_in.ASKED:
        pytest.skip("the stand-in can't see into vmap, by which transformers makes the mask")
    model = hf_bert(attention)
    batch = inputs(generator, mask)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        # Transformers compiles the making of flex attention's mask, for which this machine may have no compiler.
        with backend.use_backend(path), torch.compiler.set_stance("force_eager"):
            got = with_our_encoder(model)(**batch)
        plain = hf_bert("sdpa")(**batch)
        exact = hf_bert("sdpa").double()(**batch)
    assert got.last_hidden_state.shape == plain.last_hidden_state.shape
    assert_close(got.last_hidden_state[kept], plain.last_hidden_state[kept], exact.last_hidden_state[kept], factor=3.0)
    assert (got.last_hidden_state[~kept] == 0).all()
    if mask is not LEFT:
        first = kept[:, 0]
        assert_close(got.pooler_output[first], plain.pooler_output[first], exact.pooler_output[first], factor=3.0)


@pytest.mark.parametrize("dtype", [None, "fp8", "int8"])
def test_states_of_layers_are_kept_only_where_they_are_asked_for(dtype, generator):
    """12 to 24 buffers of a whole batch, and as many in each CUDA graph."""
    config = EncoderConfig(vocab_size=9, hidden_size=32, num_heads=2, intermediate_size=48, num_layers=4)
    encoder = Encoder(config).eval()
    encoder = encoder if dtype is None else quantize(encoder, dtype=dtype)
    packing, x = Packing.from_lengths([5, 3]), torch.randn(8, 32, generator=generator)
    with torch.no_grad(), backend.use_backend("torch"):
        every, last = encoder.run(x, packing), encoder.run(x, packing, every=False)
    assert (len(every), len(last)) == (5, 1)
    assert torch.equal(last[0], every[-1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["none", "4-D additive", "4-D bool", "4-D not padding", "3-D 0/1 not padding"])
def test_drop_in_for_masks_given_ready_made(form, attention, generator):
    model = hf_bert(attention)
    batch = inputs(generator)
    kept = batch["attention_mask"].bool()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    bool_mask = {
        "none": None,
        "4-D additive": kept[:, None, None].expand(3, 1, 9, 9),
        "4-D bool": kept[:, None, None].expand(3, 1, 9, 9),
        "4-D not padding": causal.expand(3, 1, 9, 9),
        "3-D 0/1 not padding": causal.expand(3, 9, 9).long(),
    }[form]
    if form == "none" or "not padding" in form:
        kept = torch.ones_like(kept)

    def mask_for(dtype):
        if bool_mask is None or "3-D" in form or (form != "4-D additive" and attention == "sdpa"):
            return bool_mask
        return torch.zeros(bool_mask.shape, dtype=dtype).masked_fill(~bool_mask, torch.finfo(dtype).min)

    with torch.no_grad():
        with skip_what_transformers_refuses():
            plain = model(**batch | {"attention_mask": mask_for(torch.float32)})
        got = with_our_encoder(model)(**batch | {"attention_mask": mask_for(torch.float32)})
        exact = model.double()(**batch | {"attention_mask": mask_for(torch.float64)})
    assert_close(got.last_hidden_state[kept], plain.last_hidden_state[kept], exact.last_hidden_state[kept], factor=3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_half_precision(path, dtype, generator):
    model = hf_bert().to(dtype)
    batch = inputs(generator)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        with backend.use_backend(path):
            got = with_our_encoder(model)(**batch).last_hidden_state
        plain = model(**batch).last_hidden_state
        exact = model.double()(**batch).last_hidden_state
    assert got.dtype == dtype
    assert_close(got[kept], plain[kept], exact[kept], factor=3.0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_case_07_hidden_act_is_honoured(path, activation, generator):
    model = hf_bert(hidden_act=activation)
    batch = inputs(generator)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        with backend.use_backend(path):
            got = with_our_encoder(model)(**batch).last_hidden_state
        plain = model(**batch).last_hidden_state
        exact = model.double()(**batch).last_hidden_state
    assert_close(got[kept], plain[kept], exact[kept], factor=3.0)


def test_output_hidden_states_as_transformers_gives_them(generator):
    model = hf_bert()
    batch = inputs(generator)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = model(**batch, output_hidden_states=True).hidden_states
        ours = with_our_encoder(model)(**batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_the_encoder_alone_by_position_and_by_name(generator):
    encoder = Encoder.from_hf(hf_bert().encoder)
    x = torch.randn(2, 5, 48, generator=generator)
    out = encoder(x, output_hidden_states=True)
    assert out[0] is out.last_hidden_state is out["last_hidden_state"]
    assert len(out.hidden_states) == 4
    assert out[1] is out.hidden_states
    assert encoder(x, return_dict=False)[0].shape == x.shape
    assert encoder(x).hidden_states is None


@pytest.mark.kernels
@pytest.mark.parametrize("layers", [0, 2])
def test_the_last_layer_norm_writes_the_padded_layout(layers, generator, monkeypatch):
    """Without a pass of unpacking, unless hidden states are asked for; then the last is still not unpacked again."""
    config = EncoderConfig(num_layers=layers, hidden_size=32, num_heads=2, intermediate_size=64)
    encoder = Encoder(config).eval()
    x = torch.randn(3, 5, 32, generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    packing = Packing.from_mask(mask)
    unpacked = []
    unpack = Packing.unpack

    def spy(self, packed, fill=0.0):
        unpacked.append(packed)
        return unpack(self, packed, fill)

    monkeypatch.setattr(Packing, "unpack", spy)
    with backend.use_backend("triton"), torch.no_grad():
        packed = encoder(packing.pack(x), packing=packing).last_hidden_state
        padded = encoder(x, mask).last_hidden_state
        assert len(unpacked) == (layers == 0)
        every = encoder(x, mask, output_hidden_states=True)
    assert len(unpacked) == 2 * (layers == 0) + layers
    assert torch.equal(padded, unpack(packing, packed))
    assert torch.equal(every.hidden_states[-1], padded) and torch.equal(every.last_hidden_state, padded)
    assert len(every.hidden_states) == layers + 1


def test_packed_in_packed_out(generator):
    encoder = Encoder.from_hf(hf_bert().encoder)
    mask = torch.tensor(HOLES)
    packing = Packing.from_mask(mask)
    x = torch.randn(3, 9, 48, generator=generator)
    with torch.no_grad():
        padded = encoder(x, mask).last_hidden_state
        packed = encoder(packing.pack(x), packing=packing).last_hidden_state
    assert torch.equal(packing.pack(padded), packed)


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_case_02_padding_further_changes_nothing(path, generator):
    encoder = Encoder.from_hf(hf_bert().encoder)
    x = torch.randn(3, 9, 48, generator=generator)
    mask = torch.tensor(RIGHT)
    wide = torch.full((3, 30, 48), torch.nan)
    wide[:, :9] = x
    with torch.no_grad(), backend.use_backend(path):
        few = encoder(x, mask).last_hidden_state
        many = encoder(wide, torch.nn.functional.pad(mask, (0, 21))).last_hidden_state
    assert torch.equal(few, many[:, :9])
    assert (many[:, 9:] == 0).all()


def test_case_04_all_padded_columns_keep_their_place_and_train_equals_eval(generator):
    encoder = Encoder.from_hf(hf_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).encoder)
    x = torch.randn(3, 9, 48, generator=generator)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 2:5] = True
    evaluated = encoder.eval()(x, mask).last_hidden_state
    trained = encoder.train()(x, mask).last_hidden_state
    assert evaluated.shape == x.shape
    torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_case_05_alone_as_in_a_batch(path, generator):
    encoder = Encoder.from_hf(hf_bert().encoder)
    x = torch.randn(3, 9, 48, generator=generator)
    mask = torch.tensor(RIGHT)
    with torch.no_grad(), backend.use_backend(path):
        together = encoder(x, mask).last_hidden_state
        for i in range(3):
            alone = encoder(x[i : i + 1], mask[i : i + 1]).last_hidden_state
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_case_15_empty_batches(path, shape):
    encoder = Encoder.from_hf(hf_bert().encoder)
    with torch.no_grad(), backend.use_backend(path):
        assert encoder(torch.zeros(*shape, 48), torch.ones(shape)).last_hidden_state.shape == (*shape, 48)
        out = encoder(torch.randn(2, 3, 48), torch.zeros(2, 3)).last_hidden_state
    assert (out == 0).all()


def test_case_28_state_dict_round_trip_is_bit_exact():
    module = hf_bert().encoder
    back = Encoder.from_hf(module).to_hf_state_dict()
    assert back.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(back[name], value)


def test_from_hf_keeps_dtype_and_mode():
    module = hf_bert().encoder.half().train()
    encoder = Encoder.from_hf(module)
    assert encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float16}
    assert all(p.requires_grad for p in encoder.parameters())


def test_dropout_is_drawn_anew_each_step_and_follows_torchs_seed(generator):
    encoder = Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=2, intermediate_size=64)).train()
    x = torch.randn(2, 5, 32, generator=generator)
    torch.manual_seed(1)
    first, second = encoder(x)[0], encoder(x)[0]
    torch.manual_seed(1)
    again = encoder(x)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(encoder.eval()(x)[0], encoder(x)[0])


def test_the_torch_path_trains(generator):
    encoder = Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=2, intermediate_size=64)).train()
    out = encoder(torch.randn(2, 5, 32, generator=generator), torch.tensor([[1] * 5, [1] * 2 + [0] * 3]))[0]
    out.backward(torch.randn(out.shape, generator=generator))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_case_23_compiles_without_graph_breaks(path, generator):
    encoder = Encoder.from_hf(hf_bert().encoder)
    packing = Packing.from_lengths([5, 3])
    x = torch.randn(8, 48, generator=generator)
    compiled = torch.compile(lambda x, packing: encoder(x, packing=packing)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad(), backend.use_backend(path):
        torch.testing.assert_close(compiled(x, packing), encoder(x, packing=packing)[0])


ENCODER = Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=1, intermediate_size=64))
X = torch.zeros(2, 5, 32)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("hidden_states", lambda: ENCODER(X[0])),
        ("hidden_states", lambda: ENCODER(torch.zeros(2, 5, 31))),
        ("hidden_states", lambda: ENCODER(X, packing=Packing.from_lengths([5, 5]))),
        ("attention_mask", lambda: ENCODER(X, torch.ones(2, 4))),
        ("attention_mask", lambda: ENCODER(X.view(10, 32), torch.ones(2, 5), packing=Packing.from_lengths([5, 5]))),
        ("encoder_hidden_states", lambda: ENCODER(X, encoder_hidden_states=X)),
        ("output_attentions", lambda: ENCODER(X, output_attentions=True)),
        ("head_mask", lambda: ENCODER(X, head_mask=[torch.ones(1)])),
        ("cu_seq_lens_q", lambda: ENCODER(X, cu_seq_lens_q=torch.tensor([0, 5]))),
        ("cache", lambda: ENCODER(X, cache=object())),
    ],
)
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.kernels
def test_the_triton_path_trains_as_the_torch_path(dropout, generator):
    """One step of each from the same seed: the same loss and the same gradients, whatever dropout draws."""
    config = EncoderConfig(
        hidden_size=32, num_heads=2, num_layers=2, intermediate_size=64, hidden_dropout=dropout,
        attention_dropout=dropout,
    )  # fmt: skip
    encoder = Encoder(config).train()
    x = torch.randn(2, 5, 32, generator=generator)
    dout = torch.randn(2, 5, 32, generator=generator)
    gradients = {}
    for path in ("triton", "torch"):
        encoder.zero_grad()
        torch.manual_seed(7)
        with backend.use_backend(path):
            encoder(x, torch.tensor([[1] * 5, [1] * 2 + [0] * 3]))[0].backward(dout)
        gradients[path] = [p.grad.clone() for p in encoder.parameters()]
    for kernel, plain in zip(gradients["triton"], gradients["torch"], strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-3, atol=1e-5)
