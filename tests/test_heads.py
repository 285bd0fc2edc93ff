"""Models with heads: outputs, losses and gradients against transformers' classes of the same names."""

import copy
import warnings

import pytest
import torch

import fastbert
from fastbert.checkpoints.architectures import Dialect
from fastbert.checkpoints.load import load
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError
from fastbert.model import heads
from fastbert.model.mapping import to_theirs
from fastbert.ops import cross_entropy
from fastbert.packing import Packing
from fastbert.run import eager
from fastbert.testing import assert_close

transformers = pytest.importorskip("transformers", reason="compares with transformers' models")

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 19,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = [9, 1, 4, 7]
KINDS = {
    "BertForMaskedLM": {},
    "BertForPreTraining": {"hidden_act": "gelu_new"},
    "BertForNextSentencePrediction": {},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
    "BertForMultipleChoice": {},
}


def pair(name, tmp_path, **fields):
    """A transformers model with random weights, biases and LayerNorms; and ours, loaded from its folder."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.BertConfig(**CONFIG, **fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing
        return theirs, load(tmp_path, getattr(heads, name), device=torch.get_default_device())


def batch_for(name, generator, lengths=LENGTHS):
    """Padded inputs and labels; padding holds ids and types that must not matter, and labels that don't count."""
    size, width = len(lengths), max(lengths)
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    batch = {
        "input_ids": torch.randint(1, 61, (size, width), generator=generator),
        "token_type_ids": torch.randint(2, (size, width), generator=generator),
        "attention_mask": kept.long(),
    }

    def labels(classes, *shape):
        return torch.randint(classes, shape, generator=generator)

    def some(values):
        return values.masked_fill(~kept | (torch.rand(size, width, generator=generator) < 0.6), -100)

    if name == "BertForMaskedLM":
        batch["labels"] = some(labels(61, size, width))
    elif name == "BertForPreTraining":
        batch |= {"labels": some(labels(61, size, width)), "next_sentence_label": labels(2, size)}
    elif name == "BertForNextSentencePrediction":
        batch["labels"] = labels(2, size)
    elif name == "BertForSequenceClassification":
        batch["labels"] = labels(3, size)
    elif name == "BertForTokenClassification":
        batch["labels"] = some(labels(5, size, width))
    elif name == "BertForQuestionAnswering":
        batch |= {"start_positions": labels(width, size), "end_positions": labels(width, size)}
    else:
        batch = {key: value.view(2, size // 2, width) for key, value in batch.items()}
        batch["labels"] = labels(size // 2, 2)
    return batch


def packed(name, batch):
    """The same batch for `packing=`."""
    batch = dict(batch)
    mask = batch.pop("attention_mask")
    extra = {"num_choices": mask.shape[1]} if mask.dim() == 3 else {}
    packing = Packing.from_mask(mask.flatten(0, -2))
    for key, value in batch.items():
        if value.shape == mask.shape:
            batch[key] = packing.pack(value.flatten(0, -2))
    return batch | {"packing": packing} | extra


def gradients(model, out, upstream):
    """Gradients of the parameters, of `upstream` times the loss."""
    model.zero_grad()
    (out.loss * upstream).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def as_theirs(model, ours):
    dialect = model.origin.dialect
    assert isinstance(dialect, Dialect)
    return to_theirs(ours, dialect.rules(model))


def logits(out):
    return {key: value for key, value in vars(out).items() if key.endswith("logits") and value is not None}


def compare(name, theirs, ours, batch, form="padded"):
    """Loss, logits and gradients of ours, of transformers in float32, and of transformers in float64."""
    upstream = 1.7
    exact_model = copy.deepcopy(theirs).double()
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    got = ours(**(batch if form == "padded" else packed(name, batch)))
    plain, exact = theirs(**batch), exact_model(**doubled)
    assert abs(got.loss.item() - plain.loss.item()) <= 1e-5 * max(1, abs(plain.loss.item()))
    assert_close(got.loss.detach(), plain.loss.detach(), exact.loss.detach(), factor=3, what="loss")
    mask = batch["attention_mask"].bool()
    for key, value in logits(got).items():
        wanted, truth = getattr(plain, key).detach(), getattr(exact, key).detach()
        if wanted.shape[:2] == mask.shape:
            wanted, truth = wanted[mask], truth[mask]
            value = value[mask] if form == "padded" else value
        assert_close(value.detach(), wanted, truth, factor=3, what=key)
    ours_grads = as_theirs(ours, gradients(ours, got, upstream))
    plain_grads, exact_grads = gradients(theirs, plain, upstream), gradients(exact_model, exact, upstream)
    assert ours_grads.keys() == plain_grads.keys()
    scale = max(g.abs().max().item() for g in exact_grads.values())
    for key, grad in ours_grads.items():
        truth = exact_grads[key]
        if truth.abs().max() < 1e-12 * scale:  # a key's bias has no influence: what is there is rounding
            assert grad.abs().max() < 1e-5 * scale, key
            continue
        if truth.numel() == 1:  # plain torch's error in one number may be none by luck: it counts among its layer's
            several = [f"{key.removesuffix('.bias')}.weight", key]
            found = (torch.cat([of[one].flatten() for one in several]) for of in (ours_grads, plain_grads, exact_grads))
            assert_close(*found, factor=3, what=key)
            continue
        assert_close(grad, plain_grads[key], truth, factor=3, what=key)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_are_those_of_transformers(name, form, generator, tmp_path):
    theirs, ours = pair(name, tmp_path, **KINDS[name])
    lengths = [9] * 4 if name == "BertForQuestionAnswering" else LENGTHS  # theirs takes padding for an answer
    compare(name, theirs, ours, batch_for(name, generator, lengths), form)


@pytest.mark.parametrize("given", [True, False], ids=["named", "by the labels"])
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.3, -2.0, 1.5, 0.0])),
        ("regression", 1, torch.tensor([[0.3], [-2.0], [1.5], [0.0]])),
        ("regression", 3, torch.arange(12.0).view(4, 3) / 7),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])),
        ("single_label_classification", 3, torch.tensor([2, 0, 1, 1])),
    ],
)
def test_problem_types(problem, num_labels, labels, given, generator, tmp_path):
    if problem == "regression" and num_labels > 1 and not given:
        pytest.skip("floats for three outputs mean several labels, to transformers too")
    name = "BertForSequenceClassification"
    theirs, ours = pair(name, tmp_path, num_labels=num_labels, problem_type=problem if given else None)
    compare(name, theirs, ours, batch_for(name, generator) | {"labels": labels})


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_masked_token_logits_of_every_token(path, activation, generator, tmp_path):
    theirs, ours = pair("BertForMaskedLM", tmp_path, hidden_act=activation)
    batch = batch_for("BertForMaskedLM", generator)
    del batch["labels"]
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        with fastbert.use_backend(path):
            got = ours(**batch)
            rows = ours(**packed("BertForMaskedLM", batch)).logits
        plain, exact = theirs(**batch).logits, copy.deepcopy(theirs).double()(**batch).logits
    assert got.loss is None
    assert_close(got.logits[kept], plain[kept], exact[kept], factor=3)
    assert (got.logits[~kept] == 0).all()
    assert torch.equal(rows, got.logits[kept])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_bfloat16(name, generator, tmp_path):
    theirs, ours = pair(name, tmp_path, **KINDS[name])
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    batch = batch_for(name, generator)
    with torch.no_grad():
        got, plain, exact = ours(**batch), theirs(**batch), copy.deepcopy(theirs).double()(**batch)
    assert got.loss.dtype == torch.float32
    assert_close(got.loss.bfloat16(), plain.loss, exact.loss, factor=3)


def test_pretraining_without_masked_token_labels(generator, tmp_path):
    theirs, ours = pair("BertForPreTraining", tmp_path)
    batch = batch_for("BertForPreTraining", generator)
    labels, following = batch.pop("labels"), batch.pop("next_sentence_label")
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        got, plain, exact = ours(**batch), theirs(**batch), copy.deepcopy(theirs).double()(**batch)
        assert got.loss is None
        for key in ("prediction_logits", "seq_relationship_logits"):
            g, p, e = (getattr(out, key) for out in (got, plain, exact))
            assert_close(
                *((t[kept] for t in (g, p, e)) if key == "prediction_logits" else (g, p, e)), factor=3, what=key
            )
        both = ours(**batch, labels=labels, next_sentence_label=following).loss
        each = ours(**batch, labels=labels).loss + ours(**batch, next_sentence_label=following).loss
    torch.testing.assert_close(both, each)


@pytest.mark.parametrize("name", KINDS)
def test_asking_for_hidden_states_changes_nothing_else(name, generator, tmp_path):
    theirs, ours = pair(name, tmp_path, **KINDS[name])
    batch = batch_for(name, generator)
    kept = batch["attention_mask"].flatten(0, -2).bool()
    few, full = ours(**batch), ours(**batch, output_hidden_states=True)
    torch.testing.assert_close(few.loss, full.loss)
    assert few.hidden_states is None
    assert logits(few).keys() == logits(full).keys()
    for key, value in logits(few).items():
        torch.testing.assert_close(value, logits(full)[key])
    wanted = gradients(ours, full, 1.0)
    for key, grad in gradients(ours, few, 1.0).items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-4, atol=1e-6, msg=key)
    expected = theirs(**batch, output_hidden_states=True).hidden_states
    assert len(full.hidden_states) == len(expected) == 3
    for got, state in zip(full.hidden_states, expected, strict=True):
        torch.testing.assert_close(got[kept], state[kept], rtol=1e-4, atol=1e-5)


# What the head reads


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_reading_few_rows_of_the_last_layer_changes_nothing(path, generator):
    encoder = fastbert.Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=2, intermediate_size=48)).eval()
    packing = Packing.from_lengths([5, 0, 3, 9])
    x = torch.randn(17, 32, generator=generator)
    read = torch.tensor([0, 16, 5, 5])
    with torch.no_grad(), fastbert.use_backend(path):
        few, whole = encoder.run(x, packing, read=read), encoder.run(x, packing)
    assert few[-1].shape == (4, 32)
    torch.testing.assert_close(few[-1], whole[-1][read])
    assert all(torch.equal(a, b) for a, b in zip(few[:-1], whole[:-1], strict=True))


def test_gradients_of_the_rows_that_are_read(generator):
    encoder = fastbert.Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=2, intermediate_size=48)).eval()
    packing = Packing.from_lengths([5, 3, 9])
    x = torch.randn(17, 32, generator=generator, requires_grad=True)
    read = torch.tensor([0, 16, 5, 5])
    upstream = torch.randn(4, 32, generator=generator)
    inputs = [x, *encoder.parameters()]
    few = torch.autograd.grad(encoder.run(x, packing, read=read)[-1], inputs, upstream)
    whole = torch.autograd.grad(encoder.run(x, packing)[-1][read], inputs, upstream)
    for got, expected in zip(few, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    empty = fastbert.Encoder(EncoderConfig(hidden_size=32, num_heads=2, num_layers=0))
    assert torch.equal(empty.run(x, packing, read=read)[-1], x[read])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("BertForSequenceClassification", 4), ("BertForMaskedLM", None), ("BertForTokenClassification", sum(LENGTHS))],
)
def test_the_last_feed_forward_sees_only_what_the_head_reads(name, rows, generator, tmp_path, monkeypatch):
    _, ours = pair(name, tmp_path, **KINDS[name])
    batch = batch_for(name, generator)
    rows = int((batch["labels"] != -100).sum()) if rows is None else rows
    assert rows > 0
    seen = []
    activate = eager.linear_activation

    def counted(x, weight, bias, activation, **options):
        if activation is not None:
            seen.append(len(x))
        return activate(x, weight, bias, activation, **options)

    monkeypatch.setattr(eager, "linear_activation", counted)
    ours(**batch)
    assert seen == [sum(LENGTHS), rows]


def test_masked_token_logits_are_never_whole(generator, tmp_path, monkeypatch):
    from test_cross_entropy import LargestAllocation

    _, ours = pair("BertForMaskedLM", tmp_path)
    ids = torch.randint(61, (40, 19), generator=generator)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 50 * 61)
    with LargestAllocation() as largest:
        ours(ids, labels=ids).loss.backward()
    assert largest.elements <= ids.numel() * 3 * 24 < ids.numel() * 61 * 2  # qkv, which is larger than a chunk


# Padding, and nothing to learn from


@pytest.mark.parametrize("name", KINDS)
def test_padding_further_changes_nothing(name, generator, tmp_path):
    _, ours = pair(name, tmp_path, **KINDS[name])
    batch = batch_for(name, generator)
    shape = batch["input_ids"].shape
    wide = {key: value for key, value in batch.items() if value.shape != shape}
    for key, value in batch.items():
        if value.shape == shape:  # the padding even claims to have labels
            wide[key] = torch.nn.functional.pad(value, (0, 6), value=0 if key == "attention_mask" else 1)
    few, many = ours(**batch), ours(**wide)
    torch.testing.assert_close(few.loss, many.loss, rtol=1e-6, atol=0)


def test_an_answer_is_never_padding(generator, tmp_path):
    _, ours = pair("BertForQuestionAnswering", tmp_path)
    batch = batch_for("BertForQuestionAnswering", generator)
    starts, ends = [8, 0, -1, 100], [8, 5, 3, 2]  # 100 is beyond the grid and 5 is padding: they count for nothing
    out = ours(**batch | {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)})
    padding = ~batch["attention_mask"].bool()
    assert (out.start_logits[padding] == -torch.inf).all() and (out.end_logits[padding] == -torch.inf).all()

    def mean_alone(which, positions):
        losses = []
        for i, at in positions:
            text = {key: batch[key][i : i + 1, : LENGTHS[i]] for key in ("input_ids", "token_type_ids")}
            losses.append(-getattr(ours(**text), which)[0].log_softmax(0)[at])
        return torch.stack(losses).mean()

    start = mean_alone("start_logits", [(0, 8), (1, 0), (2, 0)])
    torch.testing.assert_close(out.loss, (start + mean_alone("end_logits", [(0, 8), (2, 3), (3, 2)])) / 2)
    assert all(grad.isfinite().all() for grad in gradients(ours, out, 1.0).values())


@pytest.mark.parametrize("name", KINDS)
def test_no_label_that_counts_gives_zero_and_no_gradient(name, generator, tmp_path):
    _, ours = pair(name, tmp_path, **KINDS[name])
    batch = batch_for(name, generator)
    for key in ("labels", "next_sentence_label"):
        if key in batch:
            batch[key] = torch.full_like(batch[key], -100)
    for key in ("start_positions", "end_positions"):
        if key in batch:
            batch[key] = torch.full_like(batch[key], 9)
    out = ours(**batch)
    assert out.loss == 0
    assert all((grad == 0).all() for grad in gradients(ours, out, 1.0).values())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2, 0], [0, 0, 0, 0]], ids=["some", "all"])
def test_sequences_of_length_zero(name, lengths, generator, tmp_path):
    _, ours = pair(name, tmp_path, **KINDS[name])
    batch = batch_for(name, generator, [4, *lengths[1:]])
    batch["attention_mask"] = (torch.arange(4) < torch.tensor(lengths)[:, None]).long().view(batch["input_ids"].shape)
    out = ours(**batch)
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(ours, out, 1.0).values())


@pytest.mark.parametrize("hidden_states", [False, True])
def test_the_class_token_of_an_empty_sequence_is_zero(hidden_states, generator, tmp_path):
    _, ours = pair("BertForSequenceClassification", tmp_path)
    packing = Packing.from_lengths([2, 0, 3, 0])
    ids = torch.randint(61, (5,), generator=generator)
    with torch.no_grad():
        got = ours(ids, packing=packing, output_hidden_states=hidden_states).logits
        torch.testing.assert_close(got[1], ours.classifier(ours.bert.pooler.bias.tanh()))
        assert torch.equal(got[1], got[3])


def test_an_empty_batch():
    ours = heads.BertForSequenceClassification(EncoderConfig(vocab_size=9, hidden_size=16, num_heads=2, num_layers=1))
    out = ours(torch.zeros(0, 4, dtype=torch.int64), labels=torch.zeros(0, dtype=torch.int64))
    assert out.logits.shape == (0, 2)
    assert out.loss == 0


# Training


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"]
)
def test_dropout_before_the_classifier(name, generator, tmp_path):
    _, ours = pair(name, tmp_path, **KINDS[name], classifier_dropout=0.5)
    assert ours.head_config.classifier_dropout == 0.5
    batch = batch_for(name, generator)
    seen = []
    ours.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ours.train()(**batch)
    ours.eval()(**batch)
    kept = seen[0] != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])


def test_dropout_before_the_classifier_is_the_hidden_one_by_default():
    config = EncoderConfig(vocab_size=9, hidden_size=16, num_heads=2, num_layers=0, hidden_dropout=0.75)
    ours = heads.BertForTokenClassification(config).train()
    dropped = ours._drop(torch.ones(100, 16)) == 0
    assert 0.7 < dropped.float().mean() < 0.8


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_a_training_step_compiles_without_graph_breaks(name, generator, tmp_path):
    _, ours = pair(name, tmp_path, **KINDS[name])
    batch = packed(name, batch_for(name, generator))
    compiled = torch.compile(lambda batch: ours(**batch).loss, fullgraph=True, backend="aot_eager")
    ours.zero_grad()
    loss = compiled(batch)
    loss.backward()
    grads = {key: parameter.grad.clone() for key, parameter in ours.named_parameters()}
    out = ours(**batch)
    torch.testing.assert_close(loss, out.loss)
    for key, grad in gradients(ours, out, 1.0).items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_initialised_as_transformers(name):
    """Weights normal, biases 0, LayerNorms 1, the row of the padding token 0."""
    sizes = {**CONFIG, "vocab_size": 500, "hidden_size": 96, "intermediate_size": 200, "initializer_range": 0.05}
    hf = transformers.BertConfig(**sizes, **KINDS[name])
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(hf)
    ours = getattr(heads, name)(EncoderConfig.from_hf(hf), HeadConfig.from_hf(hf))
    dialect = Dialect("bert", "bert.", old_norms=False, pooler=ours.pooler)
    got = to_theirs(ours.state_dict(), dialect.rules(ours))
    assert got.keys() == dict(theirs.named_parameters()).keys()
    for key, expected in theirs.named_parameters():
        assert got[key].shape == expected.shape
        if expected.unique().numel() <= 2:
            assert torch.equal(got[key], expected), key
        elif expected.numel() > 1000:
            torch.testing.assert_close(got[key].std(), expected.std(), rtol=0.1, atol=0)
        else:
            assert got[key].abs().max() < 0.3, key
    assert (got["bert.embeddings.word_embeddings.weight"][0] == 0).all()


# Arguments


def test_head_config_and_hugging_faces():
    hf = transformers.BertConfig(
        id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1}, problem_type="regression", classifier_dropout=0.3
    )
    ours = HeadConfig(("neg", "pos"), "regression", 0.3)
    assert HeadConfig.from_hf(hf) == ours
    assert HeadConfig.from_hf(ours.to_hf()) == ours
    assert HeadConfig.from_hf(transformers.BertConfig(**ours.to_hf()).to_dict()) == ours
    assert HeadConfig.from_hf({}) == HeadConfig.from_hf(transformers.BertConfig()) == HeadConfig()
    assert HeadConfig.from_hf({"num_labels": 3}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert HeadConfig.from_hf({"id2label": {"1": "b", "0": "a", "2": "c"}}).labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("labels", lambda: HeadConfig(())),
        ("labels", lambda: HeadConfig(("a", "a"))),
        ("problem_type", lambda: HeadConfig(problem_type="ranking")),
        ("classifier_dropout", lambda: HeadConfig(classifier_dropout=1.0)),
        ("config.id2label", lambda: HeadConfig.from_hf({"id2label": ["a", "b"]})),
        ("config.id2label", lambda: HeadConfig.from_hf({"id2label": {"1": "a", "2": "b"}})),
    ],
)
def test_bad_head_configs(argument, make):
    with pytest.raises(ArgumentError) as error:
        make()
    assert error.value.argument == argument


IDS = torch.ones(2, 3, dtype=torch.int64)
SMALL = EncoderConfig(vocab_size=9, hidden_size=16, num_heads=2, num_layers=1, intermediate_size=16)
LABELS3 = HeadConfig(("a", "b", "c"))


@pytest.mark.parametrize(
    ("argument", "name", "given"),
    [
        ("labels", "BertForMaskedLM", {"labels": IDS[:1]}),
        ("labels", "BertForMaskedLM", {"labels": IDS * 9}),
        ("labels", "BertForPreTraining", {"labels": IDS[0]}),
        ("next_sentence_label", "BertForPreTraining", {"next_sentence_label": torch.tensor([0, 2])}),
        ("labels", "BertForNextSentencePrediction", {"labels": torch.tensor([0])}),
        ("labels", "BertForSequenceClassification", {"labels": torch.tensor([0, 3])}),
        ("labels", "BertForSequenceClassification", {"labels": torch.zeros(2, 2)}),
        ("labels", "BertForTokenClassification", {"labels": IDS * 3}),
        ("labels", "BertForTokenClassification", {"labels": IDS.float()}),
        ("start_positions", "BertForQuestionAnswering", {"start_positions": IDS, "end_positions": IDS[:, 0]}),
        ("input_ids", "BertForMultipleChoice", {}),
        ("num_choices", "BertForMultipleChoice", {"packing": Packing.from_lengths([2, 4])}),
        ("num_choices", "BertForMultipleChoice", {"packing": Packing.from_lengths([2, 4]), "num_choices": 3}),
    ],
)
def test_bad_input_names_the_argument(argument, name, given):
    with pytest.raises(ArgumentError) as error:
        getattr(heads, name)(SMALL, LABELS3)(IDS, **given)
    assert error.value.argument == argument


def test_outputs_by_name_and_by_position():
    out = heads.BertForTokenClassification(SMALL)(IDS, labels=IDS)
    assert out[0] is out.loss is out["loss"]
    assert out[1] is out.logits
    assert heads.BertForTokenClassification(SMALL)(IDS)[0].shape == (2, 3, 2)
