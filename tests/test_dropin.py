"""The encoder inside other people's programs: saved, loaded, frozen, adapted, hooked, checkpointed, moved by name."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import warnings

import pytest
import torch
from processes import PYTHON
from torch import nn
from torch.nn.utils import prune as pruning

import fastbert
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model.body import BertModel
from fastbert.model.encoder import Encoder
from fastbert.packing import Packing
from fastbert.run import parts
from fastbert.testing import assert_close

transformers = pytest.importorskip("transformers", reason="its models and its Trainer are meant")

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 14, 3, 0, 0]])
MASK = (IDS != 0).long()
KEPT = MASK.bool()


def theirs(kind="BertModel", **changes):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**(SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def swapped(model):
    """A copy of `model` with our encoder."""
    model = copy.deepcopy(model)
    body = getattr(model, "bert", model)
    body.encoder = Encoder.from_hf(body.encoder)
    return model


def states(model, **options):
    return model(IDS, attention_mask=MASK, **options).last_hidden_state


def joined(encoder) -> bool:
    return all(layer.attention.self._joined is not None for layer in encoder.layer)


def test_user_case_01_save_pretrained_keeps_the_encoder(tmp_path):
    model = swapped(theirs("BertForSequenceClassification"))
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
        ours = fastbert.load(tmp_path, fastbert.BertForSequenceClassification)
    with torch.no_grad():
        torch.testing.assert_close(back(IDS, attention_mask=MASK).logits, expected)
        torch.testing.assert_close(ours(IDS, attention_mask=MASK).logits, expected)


def test_names_modules_and_order_are_hugging_faces():
    model = theirs()
    ours = swapped(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in model.named_parameters()]
    names = {name for name, _ in ours.named_modules()}
    assert {name for name, _ in model.named_modules() if "act_fn" not in name} <= names


def test_from_hf_keeps_the_parameter_objects_and_what_they_are():
    encoder = theirs().encoder.double()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad = "layer.0." not in name
    before = dict(encoder.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    after = dict(Encoder.from_hf(encoder).named_parameters())
    for name, parameter in after.items():
        assert parameter is before[name]
        assert parameter.requires_grad == ("layer.0." not in name)
        assert torch.equal(parameter, values[name])


def test_every_parameter_has_a_storage_of_its_own():
    """Else accelerate's `save_model` takes keys and values for copies of the queries, and drops them."""
    encoder = Encoder.from_hf(theirs().encoder)
    assert joined(encoder)
    storages = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    assert len(storages) == len(list(encoder.parameters()))
    other = pytest.importorskip("accelerate.utils.other")
    assert other.clean_state_dict_for_safetensors(encoder.state_dict()).keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    "change",
    ["double", "deepcopy", "pickle", "torch.save", "load_state_dict", "assign", "data", "share_memory", "shallow copy"],
)
def test_moved_parameters_go_on_giving_the_same_states(change):
    model = theirs()
    ours = swapped(model)
    expected = states(model)
    match change:
        case "double":
            ours, expected = ours.double(), states(model.double())
            assert joined(ours.encoder)
        case "deepcopy":
            ours = copy.deepcopy(ours)
            assert joined(ours.encoder)
        case "shallow copy":
            ours.encoder.layer[0].attention.self = copy.copy(ours.encoder.layer[0].attention.self)
        case "pickle":
            ours.encoder = pickle.loads(pickle.dumps(ours.encoder))
            assert joined(ours.encoder)
        case "torch.save":
            file = io.BytesIO()
            torch.save(ours.encoder, file)
            file.seek(0)
            ours.encoder = torch.load(file, weights_only=False)
        case "load_state_dict" | "assign":
            other = swapped(theirs(initializer_range=0.5))
            other.load_state_dict(ours.state_dict(), assign=change == "assign")
            ours = other
        case "data":
            for parameter in ours.encoder.parameters():
                parameter.data = parameter.data.clone()
        case "share_memory":
            ours.share_memory()
            assert all(parameter.is_shared() for parameter in ours.parameters())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(states(ours)[KEPT], expected[KEPT])


@pytest.mark.parametrize("apart", [False, True], ids=["side by side", "apart"])
def test_gradients_are_transformers_own(apart):
    model = theirs(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    ours = swapped(model)
    exact = copy.deepcopy(model).double()
    if apart:
        for parameter in ours.encoder.parameters():
            parameter.data = parameter.data.clone()
    ours.encoder.layer[0].attention.self.key.weight.requires_grad = False
    dout = torch.randn_like(states(model)[KEPT])
    for one in (model, ours, exact):
        states(one)[KEPT].backward(dout.to(next(one.parameters()).dtype))
    for (name, plain), mine, judge in zip(model.named_parameters(), ours.parameters(), exact.parameters(), strict=True):
        if name == "encoder.layer.0.attention.self.key.weight":
            assert mine.grad is None
        elif plain.grad is not None and "key.bias" not in name:  # whose gradient is 0 but for rounding
            assert_close(mine.grad, plain.grad, judge.grad, factor=3.0, what=name)


def test_a_parameter_changed_between_forward_and_backward_is_refused():
    ours = swapped(theirs()).train()
    out = states(ours).sum()
    with torch.no_grad():
        ours.encoder.layer[0].attention.self.value.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class LoRA(nn.Module):
    """As PEFT's: the linear layer, and a product of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(model):
    torch.manual_seed(1)
    for layer in model.encoder.layer:
        heads = layer.attention.self
        heads.query, heads.value = LoRA(heads.query), LoRA(heads.value)
        layer.output.dense = LoRA(layer.output.dense)


def halve(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(model.encoder.layer[1].intermediate.dense, "weight", Half())


def prune(model):
    pruning.l1_unstructured(model.encoder.layer[0].attention.self.key, "weight", 0.5)
    pruning.random_unstructured(model.encoder.layer[1].output.LayerNorm, "weight", 0.3)


def patch(model):
    """As accelerate does, who puts another forward on the instance."""
    dense = model.encoder.layer[0].attention.output.dense
    forward = dense.forward
    dense.forward = lambda x: forward(x) * 2.0


def steer(model):
    model.encoder.layer[0].register_forward_hook(lambda module, inputs, out: out + 1.0)
    model.encoder.layer[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0, *inputs[1:]))
    model.encoder.layer[1].attention.self.query.register_forward_hook(lambda module, inputs, out: out.flip(-1))


@pytest.mark.parametrize("change", [adapt, halve, prune, patch, steer])
@pytest.mark.parametrize("when", ["before the swap", "after it"])
def test_modules_that_others_changed_are_called(change, when):
    """LoRA, parametrizations, pruning, patched modules and hooks, which see the padded layout."""
    model = theirs()
    untouched = states(model).detach()
    if when == "before the swap" and change is not steer:
        torch.manual_seed(1)
        change(model)
        ours, expected = model, states(model)
        ours.encoder = Encoder.from_hf(ours.encoder)
    else:
        ours = swapped(model)
        for one in (model, ours):
            torch.manual_seed(1)
            change(one)
        expected = states(model)
    assert not torch.allclose(expected[KEPT], untouched[KEPT])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(states(ours)[KEPT], expected[KEPT], rtol=1e-4, atol=1e-5)
    if change is adapt:
        out = states(ours)
        out.backward(torch.randn_like(out))
        assert all(p.grad is not None for name, p in ours.named_parameters() if ".up." in name or ".down." in name)


def test_hooks_on_what_no_module_of_ours_computes_are_refused():
    model = theirs()
    model.encoder.layer[0].attention.register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match=r"encoder\.layer\.0\.attention"):
        Encoder.from_hf(model.encoder)


@pytest.mark.parametrize("name", ["attention", "attention.self", "attention.output", "intermediate", "output"])
def test_hooks_that_would_never_be_called_are_refused(name):
    """mistral-inference #246: hooks on attention that do nothing."""
    part = swapped(theirs()).encoder.layer[0].get_submodule(name)
    for register in (part.register_forward_hook, part.register_forward_pre_hook, part.register_full_backward_hook):
        with pytest.raises(ArgumentError, match="never called"):
            register(lambda *_: None)


def test_replicas_of_data_parallel_compute():
    """pytorch #33907: they have tensors in the place of parameters."""
    ours = swapped(theirs())
    expected = states(ours)
    modules = list(ours.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for name, child in module._modules.items():
            copies[id(module)]._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in module._parameters.items():
            setattr(copies[id(module)], name, None if parameter is None else parameter * 1.0)
    torch.testing.assert_close(states(copies[id(ours)])[KEPT], expected[KEPT])


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_learn_under_checkpointing(reentrant):
    """peft #80: all but the adapters is frozen."""
    ours = swapped(theirs("BertForSequenceClassification")).train().requires_grad_(False)
    adapt(ours.bert)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    ours(IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    learned = [p for p in ours.parameters() if p.requires_grad]
    assert len(learned) == 12 and all(p.grad is not None and p.grad.any() for p in learned)


def test_hooks_of_transformers_are_no_users_hooks():
    model = theirs()
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
        assert len(swapped(model)(IDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("what", ["buffer", "shape", "no encoder"])
def test_what_from_hf_cannot_carry_is_refused(what):
    encoder = theirs().encoder
    match what:
        case "buffer":
            encoder.layer[0].attention.self.register_buffer("distances", torch.zeros(3))
        case "shape":
            encoder.layer[0].intermediate.dense = nn.Linear(32, 65)
        case "no encoder":
            encoder = theirs()
    with pytest.raises(CheckpointError):
        Encoder.from_hf(encoder)


def test_freezing_by_name_and_groups_of_an_optimizer():
    ours = swapped(theirs()).train()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad = name.startswith("encoder.layer.1.") and not name.endswith("bias")
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    states(ours)[KEPT].square().mean().backward()
    optimizer.step()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_layers_may_be_dropped_indexed_and_shared(tmp_path):
    model = theirs(num_hidden_layers=4)
    ours = swapped(model)
    del model.encoder.layer[2:], ours.encoder.layer[2:]
    torch.testing.assert_close(states(ours)[KEPT], states(model)[KEPT])
    assert ours.encoder.layer[-1] is list(ours.encoder.layer)[1]
    model.encoder.layer[1] = model.encoder.layer[0]
    ours.encoder.layer[1] = ours.encoder.layer[0]
    torch.testing.assert_close(states(ours)[KEPT], states(model)[KEPT])
    loaded = BertModel(EncoderConfig(num_layers=3, hidden_size=32, num_heads=2, intermediate_size=64)).eval()
    loaded.encoder.layer = loaded.encoder.layer[:1]
    fastbert.save(loaded, tmp_path)
    back = fastbert.load(tmp_path)
    assert back.config.num_layers == 1
    with torch.no_grad():
        assert torch.equal(states(back), states(loaded))


def test_a_layer_alone_takes_what_a_bert_layer_takes():
    model = theirs()
    ours, x = swapped(model), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model.encoder.layer[0](x)
        torch.testing.assert_close(ours.encoder.layer[0](x, None), expected)
        torch.testing.assert_close(ours.encoder.layer[0](x, MASK)[0], expected[0])
    with pytest.raises(ArgumentError, match="Packing"):
        ours.encoder.layer[0](x[0], None)


def test_dropout_modules_are_heeded():
    """Monte-Carlo dropout switches them on in eval mode; other programs set their probability."""
    ours = swapped(theirs())
    with torch.no_grad():
        plain = states(ours)
        for module in ours.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        assert not torch.equal(states(ours), plain)
        for module in ours.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(states(ours), plain)
    ours.encoder.layer[0].output.dropout = nn.AlphaDropout(0.1)
    with pytest.raises(ArgumentError, match="AlphaDropout"):
        states(ours)


def test_state_dicts_of_0_1_are_read():
    encoder = Encoder.from_hf(theirs().encoder)
    new = encoder.state_dict()
    old = {}
    for i in range(2):
        at = f"layer.{i}."
        for part in ("weight", "bias"):
            heads = [new[f"{at}attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            old[f"layers.{i}.qkv.{part}"] = torch.cat(heads)
            old[f"layers.{i}.attention_output.{part}"] = new[f"{at}attention.output.dense.{part}"]
            old[f"layers.{i}.attention_norm.{part}"] = new[f"{at}attention.output.LayerNorm.{part}"]
            old[f"layers.{i}.intermediate.{part}"] = new[f"{at}intermediate.dense.{part}"]
            old[f"layers.{i}.output.{part}"] = new[f"{at}output.dense.{part}"]
            old[f"layers.{i}.output_norm.{part}"] = new[f"{at}output.LayerNorm.{part}"]
    back = Encoder.from_hf(theirs(initializer_range=0.7).encoder)
    back.load_state_dict(old)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in new.items())
    whole = nn.ModuleDict({"encoder": Encoder.from_hf(theirs(initializer_range=0.7).encoder)})
    whole.load_state_dict({f"encoder.{name}": value for name, value in old.items()})
    assert all(torch.equal(whole["encoder"].state_dict()[name], value) for name, value in new.items())


def saved_bytes(model):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randint(5, 50, (4, 32)), labels=torch.zeros(4, dtype=torch.long)).loss
    return total, loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_user_case_13_gradient_checkpointing(reentrant):
    """The same loss and gradients, dropout included, and less is kept."""
    ours = swapped(theirs("BertForSequenceClassification", num_hidden_layers=6)).train()
    found = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.zero_grad()
        torch.manual_seed(3)
        total, loss = saved_bytes(ours)
        loss.backward()
        found.append((total, loss.item(), [p.grad.clone() for p in ours.parameters()]))
    assert found[1][0] < 0.5 * found[0][0]
    # a reentrant checkpoint runs it without a gradient first, where a library may multiply instead of kernels of ours
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=0)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other)


def test_user_case_13b_checkpointing_is_never_silently_left_out():
    model = theirs(num_hidden_layers=6).train()
    model.gradient_checkpointing_enable()
    ours = swapped(model)
    assert [layer.gradient_checkpointing for layer in ours.encoder.layer] == [True] * 6
    ours.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in ours.encoder.layer)
    alone = Encoder(EncoderConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=64)).train()
    alone.layer[0].gradient_checkpointing = True
    out = alone(torch.randn(1, 4, 32, requires_grad=True))[0]
    out.backward(torch.randn_like(out))
    assert all(parameter.grad is not None for parameter in alone.parameters())


def test_user_case_46_pipelines_and_resizing(tmp_path):
    model = theirs("BertForSequenceClassification")
    ours = swapped(model)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = ["a b c", "d e f g h a b"]
    expected, got = (
        transformers.pipeline("text-classification", model=one, tokenizer=tokenizer)(texts, batch_size=2)
        for one in (model, ours)
    )
    assert [one["label"] for one in got] == [one["label"] for one in expected]
    assert [one["score"] for one in got] == pytest.approx([one["score"] for one in expected], rel=1e-4)
    ours.resize_token_embeddings(63)
    assert ours(torch.tensor([[2, 62, 3]])).logits.shape == (1, 2)
    assert ours(inputs_embeds=torch.randn(2, 3, 32)).logits.shape == (2, 2)
    with pytest.raises(ArgumentError, match="output_attentions"):
        ours(IDS, output_attentions=True)
    assert ours.half()(IDS, attention_mask=MASK).logits.dtype == torch.float16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_user_case_46_trainer_saves_what_it_trained(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    data = [{"input_ids": torch.tensor([2, 10 + i % 3, 11, 3]), "labels": i % 2} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, report_to=[], use_cpu=True, save_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    ours = swapped(theirs("BertForSequenceClassification"))
    trainer = transformers.Trainer(ours, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "best"))
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "best").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS, attention_mask=MASK).logits, ours.eval()(IDS, attention_mask=MASK).logits)


def test_a_module_is_plain_only_if_nothing_looks_on():
    linear = nn.Linear(4, 4)
    assert parts.is_plain(linear) and parts.is_plain(nn.LayerNorm(4))
    handle = linear.register_full_backward_hook(lambda *_: None)
    assert not parts.is_plain(linear)
    handle.remove()
    assert parts.is_plain(linear)
    linear.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(type("Quantized", (torch.Tensor,), {})))
    assert not parts.is_plain(linear)
    assert parts.is_plain(nn.Linear(4, 4, bias=False)) and parts.is_plain(nn.LayerNorm(4, bias=False))


@pytest.mark.parametrize("weights", ["side by side", "apart", "adapted"])
def test_it_compiles_whole(weights):
    encoder = Encoder.from_hf(theirs().encoder)
    if weights == "apart":
        encoder.layer[0].attention.self.query.weight.data = encoder.layer[0].attention.self.query.weight.data.clone()
    if weights == "adapted":
        encoder.layer[0].attention.self.query = LoRA(encoder.layer[0].attention.self.query)
    packing, x = Packing.from_lengths([5, 3]), torch.randn(8, 32)
    compiled = torch.compile(lambda x, packing: encoder(x, packing=packing)[0], fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, packing), encoder(x, packing=packing)[0])


def test_it_compiles_whole_as_the_first_thing_of_a_process():
    """Nothing that was asked before may be what makes it traceable: a cached property has a lock in Python 3.11."""
    code = (
        "import torch\n"
        "from fastbert import Encoder, EncoderConfig\n"
        "from fastbert.packing import Packing\n"
        "sizes = dict(hidden_size=32, num_heads=2, num_layers=1, intermediate_size=64)\n"
        "encoder = Encoder(EncoderConfig(**sizes)).eval()\n"
        "compiled = torch.compile(lambda x, p: encoder(x, packing=p)[0], fullgraph=True, backend='aot_eager')\n"
        "with torch.no_grad():\n"
        "    print(tuple(compiled(torch.zeros(5, 32), Packing.from_lengths([2, 3])).shape))\n"
    )
    run = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "(5, 32)\n", run.stderr
