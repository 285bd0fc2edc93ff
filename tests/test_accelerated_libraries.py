"""What libraries make of accelerated models is what they make of the models' own code."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from processes import PYTHON
from torch import Tensor, nn
from torch.func import functional_call

from fastbert import accelerate, paths_taken, restore
from fastbert.errors import ArgumentError
from fastbert.families.accelerated import accelerated
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

TEXTS = ["the film was great", "ada met alan in parisburg and the story was very dull", "music"]
IDS = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6 + [0] * 3, [1] * 4 + [0] * 5, [1] + [0] * 8])  # three columns are padding in all rows
LABELS = torch.tensor([0, 1, 0])

ROOT = Path(__file__).parent.parent

Run = Callable[[Any], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("tiny"), dropout=0.0)


@pytest.fixture
def sentence_transformers() -> Any:
    return pytest.importorskip("sentence_transformers", reason="its models are meant")


def built(folder: Path, kind: str = "Model") -> Any:
    torch.manual_seed(0)
    return getattr(T, f"Bert{kind}").from_pretrained(folder).eval()


def states(model: Any) -> Tensor:
    return model(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]


def both(model: Any, run: Run) -> tuple[Any, Any]:
    """What `run` makes of a model as it is and accelerated, where fastbert has to have computed something."""
    with torch.no_grad():
        want = run(model)
        accelerate(model, strict=True)
        with paths_taken() as taken:
            got = run(model)
    assert taken
    return got, want


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("task", ["feature-extraction", "token-classification", "fill-mask", "text-classification"])
def test_pipelines(folder: Path, task: str) -> None:
    kinds = {"feature-extraction": "Model", "token-classification": "ForTokenClassification"}
    kinds |= {"fill-mask": "ForMaskedLM", "text-classification": "ForSequenceClassification"}
    texts = [text + " [MASK]" for text in TEXTS] if task == "fill-mask" else TEXTS
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    pipe = T.pipeline(task, model=built(folder, kinds[task]), tokenizer=tokenizer, device="cpu")

    def run(model: Any) -> list[Any]:
        pipe.model = model
        padded = pipe(texts, batch_size=3)
        if task == "feature-extraction":  # which gives what stands at padding too
            padded = [[one[0][: len(alone[0])]] for one, alone in zip(padded, pipe(texts), strict=True)]
        return [pipe(texts), padded]

    got, want = both(pipe.model, run)
    for ours, theirs in zip(leaves(got), leaves(want), strict=True):
        assert ours == theirs if isinstance(theirs, str) else ours == pytest.approx(theirs, abs=2e-5, rel=2e-5)


def leaves(found: Any) -> list[Any]:
    """What a pipeline gives, flat."""
    if isinstance(found, dict):
        found = [(key, found[key]) for key in sorted(found)]
    return [leaf for one in found for leaf in leaves(one)] if isinstance(found, list | tuple) else [found]


def test_sentence_transformer(sentence_transformers: Any, folder: Path) -> None:
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")  # with the pooling by default
    same(*both(model, lambda model: model.encode(TEXTS, batch_size=2)))
    same(*both(model, lambda model: model.encode(TEXTS[:1], normalize_embeddings=True)))


def test_cross_encoder(sentence_transformers: Any, folder: Path, tmp_path: Path) -> None:
    built(folder, "ForSequenceClassification").save_pretrained(tmp_path)
    T.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    same(*both(model, lambda model: model.predict([(TEXTS[0], other) for other in TEXTS])))


def test_sparse_encoder(sentence_transformers: Any, folder: Path, tmp_path: Path) -> None:
    """SPLADE: the maximum over all columns may not see what stands at padding."""
    built(folder, "ForMaskedLM").save_pretrained(tmp_path)
    T.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = sentence_transformers.SparseEncoder(str(tmp_path), device="cpu")
    same(*both(model, lambda model: model.encode(TEXTS, convert_to_sparse_tensor=False)))


def test_multi_vector_encoder(sentence_transformers: Any, folder: Path) -> None:
    """As ColBERT: a vector of each token."""
    if not hasattr(sentence_transformers, "MultiVectorEncoder"):
        pytest.skip("sentence-transformers 6 has it")
    model = sentence_transformers.MultiVectorEncoder(str(folder), device="cpu")
    got, want = both(model, lambda model: [model.encode_document(TEXTS), model.encode_query(TEXTS)])
    for ours, theirs in zip([x for one in got for x in one], [x for one in want for x in one], strict=True):
        same(ours, theirs)


def test_trainer(folder: Path, tmp_path: Path) -> None:
    """Losses of five steps, and the weights after them, are as near to those in float64 as those of their own code."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASK, strict=True)]
    data = [{**row, "labels": label} for row, label in zip(rows, LABELS, strict=True)] * 5
    options = {"max_steps": 5, "learning_rate": 0.05, "optim": "sgd", "per_device_train_batch_size": 3, "seed": 0}
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    seen: list[Tensor] = []

    class Watched(T.Trainer):
        def compute_loss(self, *args: Any, **given: Any) -> Any:
            loss = super().compute_loss(*args, **given)
            seen.append(loss.detach())
            return loss

    losses, weights = [], []
    for change in (lambda model: model, lambda model: accelerate(model, strict=True), lambda model: model.double()):
        model = change(built(folder, "ForSequenceClassification"))
        seen.clear()
        Watched(model, T.TrainingArguments(str(tmp_path), **options), train_dataset=data).train()
        losses.append(torch.stack(seen))
        weights.append(torch.cat([x.detach().flatten() for x in model.parameters()]))
    assert len(losses[2]) == 5 and losses[2][-1] < losses[2][0]
    for plain, got, exact in (losses, weights):
        assert_close(got, plain, exact, factor=3.0)


@pytest.mark.parametrize("first", ["accelerate", "adapter"])
def test_peft(folder: Path, tmp_path: Path, first: str) -> None:
    """LoRA, and norms that are trained whole; merged and saved."""
    peft = pytest.importorskip("peft", reason="its adapters are meant")
    config = peft.LoraConfig(
        target_modules=["query", "value"], modules_to_save=["LayerNorm", "classifier"], init_lora_weights=False
    )
    model = built(folder, "ForSequenceClassification")
    if first == "accelerate":
        accelerate(model, strict=True)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    accelerate(adapted, strict=True)
    own = restore(copy.deepcopy(adapted))
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    for one in (adapted, own):
        one(**given).loss.backward()
    for (name, got), want in zip(adapted.named_parameters(), own.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=2e-5, rtol=2e-4, msg=name)
    with torch.no_grad():
        want = own(**given).logits
        adapted.save_pretrained(tmp_path)
        back = peft.PeftModel.from_pretrained(built(folder, "ForSequenceClassification"), tmp_path).eval()
        torch.testing.assert_close(back(**given).logits, want, atol=2e-5, rtol=2e-5)
        with paths_taken() as taken:
            torch.testing.assert_close(adapted.merge_and_unload()(**given).logits, want, atol=2e-5, rtol=2e-5)
    assert taken


@pytest.fixture
def fresh_accelerate() -> Iterator[Any]:
    """The library, whose one state of a process would be the Trainer's or the next test's."""
    library = pytest.importorskip("accelerate", reason="its Accelerator is meant")
    reset = library.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield library
    reset(reset_partial_state=True)


def test_prepared_by_accelerate_in_bfloat16(folder: Path, fresh_accelerate: Any) -> None:
    """Autocast around the model, which is had back without it."""
    model = accelerate(built(folder, "ForSequenceClassification"), strict=True)
    own = restore(copy.deepcopy(model))
    accelerator = fresh_accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with torch.no_grad():
        prepared, other = accelerator.prepare(model, own)
        given = {"input_ids": IDS, "attention_mask": MASK}
        with paths_taken() as taken:
            torch.testing.assert_close(prepared(**given).logits, other(**given).logits, atol=0.05, rtol=0.05)
        assert taken
        for one in (prepared, other):
            accelerator.unwrap_model(one, keep_fp32_wrapper=False)
        torch.testing.assert_close(model(**given).logits, own(**given).logits, atol=2e-5, rtol=2e-5)


def test_weights_that_accelerate_offloads(folder: Path, tmp_path: Path) -> None:
    """They are on the meta device but while a module is called: https://github.com/huggingface/transformers/pull/46978."""
    library = pytest.importorskip("accelerate", reason="its hooks are meant")
    model = built(folder)
    with torch.no_grad():
        want = states(model)
        accelerate(model, strict=True)
        for offload in (library.cpu_offload, library.disk_offload):
            offload(
                model, *([tmp_path] if offload is library.disk_offload else []), execution_device=torch.device("cpu")
            )
            assert model.encoder.layer[0].output.dense.weight.device.type == "meta"
            for _ in range(2):
                torch.testing.assert_close(states(model), want, atol=2e-5, rtol=2e-5)
            library.hooks.remove_hook_from_submodules(model)
            torch.testing.assert_close(states(model), want, atol=2e-5, rtol=2e-5)
        assert torch.equal(states(restore(model)), want)
    assert "forward" not in model.encoder.__dict__


@pytest.mark.parametrize("how", ["accelerate's hook", "a function"])
def test_a_function_around_an_accelerated_forward(folder: Path, how: str) -> None:
    """It stays through `restore` and a second `accelerate`, and through copies."""
    model = built(folder)
    with torch.no_grad():
        want = states(model)
        accelerate(model)
        calls: list[int] = []
        before = model.encoder.forward
        if how == "a function":
            model.encoder.forward = lambda *args, **given: calls.append(1) or before(*args, **given)
        else:
            hooks = pytest.importorskip("accelerate.hooks", reason="its hooks are meant")
            hook = hooks.ModelHook()
            hook.pre_forward = lambda module, *args, **given: calls.append(1) or (args, given)
            hooks.add_hook_to_module(model.encoder, hook)
        for change, served in ((accelerate, True), (restore, False), (restore, False)):
            change(model)
            calls.clear()
            with paths_taken() as taken:
                torch.testing.assert_close(states(model), want, atol=2e-5, rtol=2e-5)
            assert bool(taken) == served and calls == [1] and bool(list(accelerated(model))) == served
        with pytest.raises(ArgumentError, match="a forward that was replaced"):
            accelerate(model)
        if how == "accelerate's hook":
            hooks.remove_hook_from_module(model.encoder)
            assert torch.equal(states(model), want)


def test_another_scaling_set_later(folder: Path) -> None:
    model = accelerate(built(folder))
    with torch.no_grad():
        states(model)
        model.encoder.layer[1].attention.self.scaling = 1.0
        with pytest.warns(UserWarning, match="another scaling"):
            got = states(model)
        assert torch.equal(got, states(restore(model)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patched", ["BertSelfAttention", "BertLayer", "BertEncoder", "sdpa"])
def test_what_a_library_patches_for_all_models(folder: Path, patched: str, when: str, monkeypatch: Any) -> None:
    """As liger-kernel and xformers do, in transformers' classes or among its attention functions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.bert import modeling_bert

    model = built(folder)

    def patch() -> None:
        if patched == "sdpa":
            own = ALL_ATTENTION_FUNCTIONS["sdpa"]
            mine = lambda module, q, *args, **given: own(module, 3 * q, *args, **given)  # noqa: E731
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
        else:
            kind = getattr(modeling_bert, patched)
            theirs = kind.forward
            monkeypatch.setattr(kind, "forward", lambda self, x, *args, **given: theirs(self, 3 * x, *args, **given))

    with torch.no_grad():
        plain = states(model)
        if when == "before":
            patch()
        accelerate(model)
        if when == "after":
            states(model)
            patch()
        with pytest.warns(UserWarning, match="one of whose methods was replaced|the attention implementation 'sdpa'"):
            got = states(model)
        assert torch.equal(got, states(restore(model)))
        assert not torch.allclose(got, plain, atol=1e-3)


def test_other_models_of_the_class_are_left_alone(folder: Path) -> None:
    """https://github.com/linkedin/Liger-Kernel/pull/772."""
    model, other = built(folder), built(folder)
    with torch.no_grad():
        want = states(other)
        states(accelerate(model))
        with paths_taken() as taken:
            assert torch.equal(states(other), want) and torch.equal(states(built(folder)), want)
    assert not taken


def test_columns_of_padding_stay(folder: Path) -> None:
    """https://github.com/pytorch/pytorch/issues/97111 and 86120: the fast path of torch's encoder cut them off."""
    for mask in (MASK, MASK.flip(1), torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 0]] * 3)):
        got, want = both(built(folder), lambda model, mask=mask: model(IDS, attention_mask=mask).last_hidden_state)
        assert got.shape == want.shape == (3, 9, 32)
        same(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_loaded(folder: Path, assign: bool) -> None:
    """https://github.com/intel/intel-extension-for-pytorch/issues/356: what it gave could not be loaded again."""
    model = accelerate(built(folder), strict=True)
    with torch.no_grad():
        states(model)
        given = {name: x * 1.1 for name, x in model.state_dict().items()}
        model.load_state_dict(given, strict=True, assign=assign)
        own = built(folder)
        own.load_state_dict(given)
        torch.testing.assert_close(states(model), states(own), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("way", ["inference mode", "functional_call", "quantize_dynamic", "DataParallel"])
def test_ways_of_torch(folder: Path, way: str) -> None:
    model = accelerate(built(folder), strict=True)
    full = torch.ones_like(MASK)  # a range of int8 is that of all rows, padding too
    if way == "inference mode":
        with torch.inference_mode():
            inside = accelerate(built(folder), strict=True)
            want = states(restore(copy.deepcopy(inside)))
            torch.testing.assert_close(states(inside), want, atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            torch.testing.assert_close(states(inside), want, atol=2e-5, rtol=2e-5)
        return
    with torch.no_grad():
        if way == "functional_call":
            own, changed = states(model), {name: x * 1.1 for name, x in model.named_parameters()}
            given, before = ((IDS,), {"attention_mask": full}), [x.data_ptr() for x in changed.values()]
            got, want = (functional_call(one, changed, *given) for one in (model, restore(copy.deepcopy(model))))
            assert torch.equal(states(model), own) and [x.data_ptr() for x in changed.values()] == before
        else:
            wrap = nn.DataParallel
            if way == "quantize_dynamic":
                wrap = lambda one: torch.ao.quantization.quantize_dynamic(one, {nn.Linear}, dtype=torch.qint8)  # noqa: E731
            got, want = (wrap(one)(IDS, attention_mask=full) for one in (model, restore(copy.deepcopy(model))))
        same(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("how", ["onnx", "torch.save"])
def test_files(folder: Path, how: str, tmp_path: Path) -> None:
    model = accelerate(built(folder))
    with torch.no_grad():
        want = states(model)
        if how == "torch.save":
            torch.save(model, tmp_path / "model")
            made = torch.load(tmp_path / "model", weights_only=False)
            *_, (encoder, forward) = accelerated(made)
            assert forward.theirs is encoder is made.encoder
            torch.testing.assert_close(states(made), want)
            return
        pytest.importorskip("onnx", reason="torch writes with it")
        onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was written")
        names, path = ["ids", "mask"], str(tmp_path / "model.onnx")
        options = {"output_names": ["states"], "dynamic_axes": {name: {0: "batch", 1: "seqlen"} for name in names}}
        torch.onnx.export(States(model), (IDS, MASK), path, input_names=names, dynamo=False, **options)
        session = onnxruntime.InferenceSession(path)
        for seqlen in (9, 6):
            given = IDS[:, :seqlen].numpy(), MASK[:, :seqlen].numpy()
            got = torch.from_numpy(session.run(["states"], dict(zip(names, given, strict=True)))[0])
            torch.testing.assert_close(got[MASK[:, :seqlen].bool()], want, atol=2e-5, rtol=2e-5)


class States(nn.Module):
    """A model with one output and no options."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask).last_hidden_state


DISTRIBUTED = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import fastbert

dist.init_process_group("gloo")
rank = dist.get_rank()
model = transformers.BertForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    weight = model.classifier.weight
    weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
fastbert.accelerate(model, strict=True)
wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
ids = torch.arange(5, 5 + 4 * 7).view(4, 7) % 30
mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6, [1] * 6 + [0]])
labels = torch.tensor([0, 1, 1, 0])
mine = slice(2 * rank, 2 * rank + 2)
wrapped(ids[mine], attention_mask=mask[mine], labels=labels[mine]).loss.backward()
if rank == 0:
    got = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    fastbert.restore(model)(ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, parameter), grad in zip(model.named_parameters(), got, strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=2e-5, rtol=2e-4, msg=name)
    Path(sys.argv[2]).write_text("done")
dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """DistributedDataParallel: gradients of two halves of a batch are those of the batch."""
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, script, folder, tmp_path / "done"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert (tmp_path / "done").exists(), ran.stderr
