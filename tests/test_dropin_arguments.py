"""Models take what Hugging Face's BertModel takes, give what it gives, and go to other processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess

import pytest
import torch
from processes import PYTHON

import fastbert
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.testing import assert_close

transformers = pytest.importorskip("transformers", reason="compares with its models")

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
IDS = torch.tensor([[2, 10, 11, 3], [2, 12, 3, 0]])
MASK = (IDS != 0).long()
KEPT = MASK.bool()

with_kernels = pytest.mark.skipif(not isinstance(host(), Machine), reason=f"needs our kernels on this CPU: {host()}")


def pair(folder, kind="BertModel"):
    """A model of transformers, and ours loaded from its folder."""
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.BertConfig(**SMALL)).eval()
    theirs.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return theirs, fastbert.load(folder, getattr(fastbert, kind))


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": IDS, "return_dict": True},
        {"input_ids": IDS, "return_dict": False},
        {"input_ids": IDS, "output_attentions": False, "output_hidden_states": None, "use_cache": False},
        {"input_ids": IDS.int()},
        {"input_ids": IDS, "token_type_ids": torch.ones_like(IDS).int()},
        {"input_ids": IDS, "position_ids": torch.arange(4).flip(0).expand(2, 4).int()},
        {"inputs_embeds": torch.randn(2, 4, 32)},
        {"inputs_embeds": torch.randn(2, 4, 32), "token_type_ids": torch.ones_like(IDS)},
    ],
    ids=lambda arguments: " ".join(arguments),
)
@pytest.mark.parametrize("mask", [MASK, MASK.int(), MASK.bool(), MASK.float(), MASK.half(), MASK.to(torch.uint8)])
def test_user_case_29_forward_arguments(arguments, mask, tmp_path):
    theirs, ours = pair(tmp_path)
    arguments = arguments | {"attention_mask": mask}
    with torch.no_grad():
        plain, got = theirs(**arguments | {"attention_mask": MASK})[0], ours(**arguments)[0]
        if "inputs_embeds" in arguments:
            arguments["inputs_embeds"] = arguments["inputs_embeds"].double()
        exact = theirs.double()(**arguments | {"attention_mask": MASK})[0]
    assert_close(got[KEPT], plain[KEPT], exact[KEPT], factor=3.0)


def test_user_case_29_outputs_are_read_by_name_and_by_position(tmp_path):
    theirs, ours = pair(tmp_path)
    expected, out = theirs(IDS), ours(IDS)
    assert list(out.keys()) == list(expected.keys())
    assert dict(out).keys() == dict(expected).keys()
    assert [name for name, _ in out.items()] == list(expected.keys())
    assert "pooler_output" in out and "hidden_states" not in out
    last, pooled = out[:2]
    assert out["pooler_output"] is pooled and out[0] is last
    assert type(ours(IDS, return_dict=False)) is tuple and len(ours(IDS, return_dict=False)) == 2


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("output_attentions", {"input_ids": IDS, "output_attentions": True}),
        ("encoder_hidden_states", {"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 4, 32)}),
        ("head_mask", {"input_ids": IDS, "head_mask": torch.ones(2, 2)}),
        ("past_key_values", {"input_ids": IDS, "past_key_values": object()}),
        ("lables", {"input_ids": IDS, "lables": IDS}),
        ("input_ids", {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 32)}),
        ("input_ids", {}),
        ("input_ids", {"input_ids": IDS[0]}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(2, 32)}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(2, 4, 31)}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(2, 4, 32, dtype=torch.float16)}),
        ("mask", {"input_ids": IDS, "attention_mask": MASK * 2}),
    ],
)
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_what_is_not_served_is_refused_with_words(kind, argument, given, tmp_path):
    _, ours = pair(tmp_path, kind)
    with pytest.raises(ArgumentError) as error:
        ours(**given)
    assert error.value.argument == argument


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("BertForMaskedLM", {"labels": IDS}),
        ("BertForTokenClassification", {"labels": MASK}),
        ("BertForSequenceClassification", {"labels": torch.tensor([0, 1])}),
        ("BertForNextSentencePrediction", {"labels": torch.tensor([0, 1])}),
        ("BertForPreTraining", {"labels": IDS, "next_sentence_label": torch.tensor([0, 1])}),
        (
            "BertForQuestionAnswering",
            {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 1])},
        ),
        ("BertForMultipleChoice", {"labels": torch.tensor([1])}),
    ],
)
def test_heads_take_embeddings_and_give_tuples(kind, labels, tmp_path):
    theirs, ours = pair(tmp_path, kind)
    embeddings = theirs.bert.embeddings.word_embeddings(IDS).detach()
    ids, mask = IDS, MASK
    if kind == "BertForMultipleChoice":
        ids, mask, embeddings = ids[None], mask[None], embeddings[None]
    with torch.no_grad():
        by_ids = ours(ids, mask, return_dict=False)
        by_embeddings = ours(inputs_embeds=embeddings, attention_mask=mask)
        learned = [
            ours(attention_mask=mask, **labels, **given).loss
            for given in ({"input_ids": ids.int()}, {"inputs_embeds": embeddings})
        ]
    assert type(by_ids) is tuple
    for one, other in zip(by_ids, by_embeddings.to_tuple(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*learned)


def test_embeddings_have_a_gradient_and_dropout(tmp_path):
    """As integrated gradients and adversarial training ask for."""
    theirs, ours = pair(tmp_path)
    x, dout = torch.randn(2, 4, 32), torch.randn(int(KEPT.sum()), 32)
    found = []
    for model in (theirs, ours):
        given = x.clone().requires_grad_()
        model(inputs_embeds=given, attention_mask=MASK).last_hidden_state[KEPT].backward(dout)
        found.append(given.grad[KEPT])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    ours.train()
    assert not torch.equal(ours(inputs_embeds=x)[0], ours(inputs_embeds=x)[0])


@pytest.mark.parametrize("used", [False, True], ids=["before use", "after use"])
def test_user_case_04_pickle_and_deepcopy(used, tmp_path):
    for kind, name in (
        ("BertModel", "TextEncoder"),
        ("BertForSequenceClassification", "TextClassifier"),
        ("BertForTokenClassification", "TextTagger"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        pair(folder, kind)
        made = getattr(fastbert, name).from_folder(folder)

        def answer(one):
            match type(one).__name__:
                case "TextEncoder":
                    return one.encode(["a b c", "d"], max_length=16).tolist()
                case "TextClassifier":
                    return one.classify(["a b c", "d"], max_length=16)
            return one.tag(["a b c", "d"], max_length=16)

        expected = answer(made) if used else None
        for one in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):
            assert answer(one) == (expected or answer(made))
        for part in (made.model, made.tokenizer):
            pickle.loads(pickle.dumps(part))


WORKERS = """
import sys, torch, fastbert

class Rows(torch.utils.data.Dataset):
    def __init__(self, encoder):
        self.encoder = encoder

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.from_numpy(self.encoder.tokenizer.encode(["a b c"], 16).ids.copy())

if __name__ == "__main__":
    rows = Rows(fastbert.TextEncoder.from_folder(sys.argv[1]))
    for how in ("fork", "spawn", "forkserver"):
        loader = torch.utils.data.DataLoader(rows, 2, num_workers=1, multiprocessing_context=how, timeout=120)
        assert torch.equal(torch.cat(list(loader)), torch.stack([rows[i] for i in range(4)]))
    print("done")
"""


def test_user_case_41_workers_of_a_loader(tmp_path):
    pair(tmp_path)
    (tmp_path / "workers.py").write_text(WORKERS)
    ran = subprocess.run([*PYTHON, tmp_path / "workers.py", tmp_path], capture_output=True, text=True)
    assert ran.stdout == "done\n", ran.stderr


FORKED = """
import os, signal, sys, torch, fastbert
torch.set_num_threads(2)
encoder = fastbert.TextEncoder.from_folder(sys.argv[1])
texts = ["a b c d e f g h"] * 300
if sys.argv[2] == "used":
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)
    encoder.encode(texts, max_length=16)
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.randn(1000, 1000).exp().sum()
    made = encoder.encode(texts, max_length=16)
    os._exit(0 if made.shape == (300, 32) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that forks processes")
@pytest.mark.parametrize("used", ["loaded", "used"])
def test_a_forked_process_does_not_hang(used, tmp_path):
    """As gunicorn --preload forks its workers."""
    pair(tmp_path)
    ran = subprocess.run([*PYTHON, "-c", FORKED, tmp_path, used], capture_output=True, text=True)
    assert ran.stdout == "0\n", (ran.stdout, ran.stderr)


FORKED_IN_THE_MIDDLE = """
import os, signal, sys, threading, fastbert
encoder = fastbert.TextEncoder.from_folder(sys.argv[1])
texts = ["a b c d e f g h"] * 300
wanted = encoder.encode(texts, max_length=16)
if sys.argv[2] == "tokenises":
    work = lambda: encoder.tokenizer.encode(texts * 20, 16)
else:
    from fastbert.cpu import program
    from fastbert.cpu.machine import host
    kept = []  # a kernel is never given back
    work = lambda: kept.append(program.compiled(host(), "nothing", ["x"], lambda code: None))
done = threading.Event()
def on_and_on():
    while not done.is_set():
        work()
threading.Thread(target=on_and_on, daemon=True).start()
for _ in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        work()
        os._exit(0 if abs(encoder.encode(texts, max_length=16) - wanted).max() < 1e-5 else 1)
    print(os.waitpid(child, 0)[1])
done.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that forks processes")
@pytest.mark.parametrize("work", ["tokenises", pytest.param("compiles", marks=with_kernels)])
def test_a_process_forked_while_another_thread_works_does_not_hang(work, tmp_path):
    """A lock that a thread held is open in the child, though that thread is not there."""
    pair(tmp_path)
    ran = subprocess.run([*PYTHON, "-c", FORKED_IN_THE_MIDDLE, tmp_path, work], capture_output=True, text=True)
    assert ran.stdout == "0\n" * 4, (ran.stdout, ran.stderr)


class Whole(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask)[0]


@pytest.mark.parametrize("recorder", ["torch.jit.trace", "torch.export"])
@pytest.mark.parametrize("which", ["drop-in", "loaded"])
def test_user_case_15_jit_trace(which, recorder, tmp_path):
    """Recorded, the work of the first batch would be done for every other."""
    theirs, ours = pair(tmp_path)
    if which == "drop-in":
        theirs.encoder = fastbert.Encoder.from_hf(theirs.encoder)
        ours = theirs
    record = torch.jit.trace if recorder == "torch.jit.trace" else torch.export.export
    with torch.no_grad(), pytest.raises(BackendError, match=recorder):
        record(Whole(ours), (IDS, MASK))
