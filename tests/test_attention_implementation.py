"""The attention implementation `fastbert` in models of transformers that are of none of the families."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert import accelerate, paths_taken
from fastbert.errors import BackendError
from fastbert.families import attention as ours
from fastbert.packing import Packing
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "initializer_range": 0.2,
}
TOKENS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": 60}
T5 = {"d_model": 48, "num_heads": 3, "d_kv": 20, "d_ff": 80, "num_layers": 2, "vocab_size": 60}
# Class, config, and whether it sees only what is before.
MODELS: dict[str, tuple[Any, Any, bool]] = {
    "ViT": (T.ViTModel, lambda: T.ViTConfig(**SIZES, image_size=12, patch_size=4), False),
    "CLIP's images": (T.CLIPVisionModel, lambda: T.CLIPVisionConfig(**SIZES, image_size=12, patch_size=4), False),
    "CLIP's texts": (T.CLIPTextModel, lambda: T.CLIPTextConfig(**SIZES, **TOKENS), True),
    "Data2Vec": (T.Data2VecTextModel, lambda: T.Data2VecTextConfig(**SIZES, **TOKENS), False),
    "T5's encoder": (T.T5EncoderModel, lambda: T.T5Config(**T5), False),
    "Llama, grouped": (T.LlamaModel, lambda: T.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=1), True),
    "Mistral, windows": (
        T.MistralModel,
        lambda: T.MistralConfig(**SIZES, **TOKENS, sliding_window=4, num_key_value_heads=3),
        True,
    ),
}
IDS = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8, [1] * 6 + [0] * 3])
HOLES = RIGHT.clone()
HOLES[0, 3], HOLES[3, 2] = 0, 0
MASKS = {"right": RIGHT, "left": RIGHT.flip(1), "holes": HOLES, "none": None, "ones": torch.ones_like(RIGHT)}
IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def registered() -> None:
    fastbert.register_attention()


def model_of(name: str, **changes: Any) -> Any:
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    given = config()
    for field, value in changes.items():
        setattr(given, field, value)
    model = kind(given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def states(model: Any, mask: Tensor | None = RIGHT, **options: Any) -> Tensor:
    """Rows that are no padding."""
    if model.main_input_name == "pixel_values":
        return model(IMAGES.to(model.dtype), **options).last_hidden_state.flatten(0, 1)
    out = model(IDS, attention_mask=mask, **options).last_hidden_state
    return out.flatten(0, 1) if mask is None else out[mask.bool()]


def by(implementation: str, model: Any) -> Any:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


@pytest.mark.parametrize("mask", MASKS)
def test_inference(name: str, mask: str) -> None:
    model, given = by("sdpa", model_of(name)), MASKS[mask]
    with torch.no_grad():
        plain, exact = states(model, given), states(copy.deepcopy(model).double(), given)
        got = states(by("fastbert", model), given)
    assert_close(got, plain, exact, factor=3.0)


def test_gradients(name: str) -> None:
    model = by("sdpa", model_of(name)).train()
    for part in model.modules():
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(part, attribute, None), float):
                setattr(part, attribute, 0.0)
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    grads = []
    dout = torch.randn(states(model).shape, generator=torch.Generator().manual_seed(2))
    for one in (copy.deepcopy(model), by("fastbert", copy.deepcopy(model)), model.double()):
        names, parameters = zip(*one.named_parameters(), strict=True)
        found = torch.autograd.grad(states(one), parameters, dout.to(one.dtype), allow_unused=True)
        grads.append({name: grad for name, grad in zip(names, found, strict=True) if grad is not None})
    plain, got, exact = grads
    assert list(got) == list(plain)
    for key in exact:
        assert_close(got[key], plain[key], exact[key], factor=3.0, ulps=16.0, what=key)


def test_what_is_causal_stays_so(name: str) -> None:
    """A later token changes what comes before it where the model is bidirectional, and only there."""
    if MODELS[name][0].main_input_name == "pixel_values":
        pytest.skip("there is nothing before or after in an image")
    model = by("fastbert", model_of(name))
    changed = IDS.clone()
    changed[:, 8] = (changed[:, 8] - 5 + 1) % 55 + 5
    for mask in (None, torch.ones_like(IDS)):
        with torch.no_grad():
            before, after = (model(ids, attention_mask=mask).last_hidden_state[:, :8] for ids in (IDS, changed))
        assert torch.allclose(before, after, atol=1e-5) is MODELS[name][2]


def test_padding_is_read_once_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = by("fastbert", model_of("Data2Vec")), []
    from_mask, op = Packing.from_mask, ours.attention
    monkeypatch.setattr(Packing, "from_mask", lambda mask: seen.append("read") or from_mask(mask))
    monkeypatch.setattr(ours, "attention", lambda qkv, *args, **given: seen.append(len(qkv)) or op(qkv, *args, **given))
    with torch.no_grad():
        states(model)
    assert seen == ["read", int(RIGHT.sum()), int(RIGHT.sum())]


class Module(torch.nn.Module):
    """What a model hands to attention beside the states."""

    is_causal = False


def qkv(heads: int = 3, grouped: int = 3, seqlen: int = 5, width: int = 7) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(2, count, seqlen, width) for count in (heads, grouped, grouped)]


def reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scale + bias).softmax(-1)
    return (weights @ value).transpose(1, 2)


BIASES = {
    "none": None,
    "floating": torch.randn(2, 1, 5, 5),
    "of heads": torch.randn(1, 6, 5, 5),
    "one row for all": torch.randn(2, 1, 1, 5),
    "a key that none sees": torch.tensor([True, True, False, True, True])[None, None, None].expand(2, 1, 5, 5),
    "2-D": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize("position_bias", [None, torch.randn(1, 6, 5, 5)])
@pytest.mark.parametrize("mask", BIASES)
@pytest.mark.parametrize("grouped", [1, 2, 6])
def test_calls(mask: str, grouped: int, position_bias: Tensor | None) -> None:
    states, given = qkv(6, grouped), BIASES[mask]
    added = 0.0 if given is None else given
    if given is not None and not given.is_floating_point():
        hidden = (given == 0)[:, None, None] if given.dim() == 2 else ~given
        added = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    added = added + (0.0 if position_bias is None else position_bias)
    plain, exact = (
        reference(*(x.to(dtype) for x in states), added if isinstance(added, float) else added.to(dtype), 0.3)
        for dtype in (torch.float32, torch.float64)
    )
    got, weights = ours.attention_forward(Module(), *states, given, scaling=0.3, position_bias=position_bias)
    assert weights is None
    kept = given.bool() if mask == "2-D" else slice(None)
    assert_close(got[kept], plain[kept], exact[kept], factor=3.0)
    if mask == "2-D" and position_bias is None:
        assert not got[~kept].any()


def test_dropout_is_drawn_and_right_on_average() -> None:
    states = qkv()
    with torch.no_grad():
        want, _ = ours.attention_forward(Module(), *states, None)
        drawn = [ours.attention_forward(Module(), *states, None, dropout=0.3)[0] for _ in range(400)]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(torch.stack(drawn).mean(0), want, atol=0.25, rtol=0.0)


UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "causal by the call": ({"is_causal": True}, "causal attention without a mask"),
    "a window": ({"sliding_window": 2}, "a sliding window without a mask"),
    "weights": ({"output_attentions": True}, "output_attentions"),
    "a soft cap": ({"softcap": 30.0}, "softcap"),
    "sinks": ({"s_aux": torch.zeros(3)}, "s_aux"),
    "lengths": ({"cu_seq_lens_q": torch.zeros(3)}, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("unserved", UNSERVED)
def test_what_is_not_served_is_an_error(unserved: str) -> None:
    given, reason = UNSERVED[unserved]
    states = qkv()
    with pytest.raises(BackendError, match=f"attention of Module: .*{reason}"):
        ours.attention_forward(Module(), *states, None, **given)
    ours.attention_forward(Module(), *states, None, **dict.fromkeys(given), position_ids=torch.arange(5))


def test_other_keys_than_queries_are_an_error() -> None:
    query, key, value = qkv()
    with pytest.raises(BackendError, match="4 queries of 5 keys"):
        ours.attention_forward(Module(), query[:, :, :4], key, value, None)
    for states in ([query, key[:, :2], value[:, :2]], [query, key, value[..., :3]], [query[:1], key, value]):
        with pytest.raises(BackendError, match="queries, keys and values of shapes"):
            ours.attention_forward(Module(), *states, None)


def test_a_module_that_does_not_say_is_taken_for_causal() -> None:
    """As transformers takes it; one token sees itself either way."""
    with pytest.raises(BackendError, match="causal attention"):
        ours.attention_forward(torch.nn.Identity(), *qkv(), None)
    ours.attention_forward(torch.nn.Identity(), *qkv(seqlen=1), None)


def test_models_that_ask_for_more() -> None:
    with torch.no_grad():
        with pytest.raises(BackendError, match="output_attentions"):
            states(by("fastbert", model_of("Data2Vec", output_attentions=False)), output_attentions=True)
        llama = T.LlamaForCausalLM(MODELS["Llama, grouped"][1]()).eval()
        with pytest.raises(BackendError, match="1 queries of 5 keys"):
            by("fastbert", llama).generate(IDS[:1, :4], max_new_tokens=3, do_sample=False)
        want = by("eager", llama).generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, use_cache=False)
        got = by("fastbert", llama).generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(got, want)


def test_it_is_not_recorded() -> None:
    model = by("fastbert", model_of("ViT"))
    with pytest.raises(BackendError, match=r"torch\.export"):
        torch.export.export(model, (IMAGES,), strict=False)


def test_an_accelerated_model_is_computed_as_before() -> None:
    torch.manual_seed(0)
    model = T.BertModel(T.BertConfig(**SIZES, vocab_size=60)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        want = states(by("eager", model))
        warnings.simplefilter("error")
        torch.testing.assert_close(states(by("fastbert", model)), want, atol=2e-5, rtol=2e-5)
        with paths_taken() as taken:
            torch.testing.assert_close(states(accelerate(model, strict=True)), want, atol=2e-5, rtol=2e-5)
    assert taken


@pytest.mark.long
@pytest.mark.parametrize("name", ["Data2Vec", "Llama, grouped"])
def test_it_compiles(name: str) -> None:
    model = by("sdpa", model_of(name))
    with torch.no_grad():
        want = states(model)
        compiled = torch.compile(by("fastbert", model), backend="eager")
        torch.testing.assert_close(states(compiled), want, atol=2e-5, rtol=2e-5)
