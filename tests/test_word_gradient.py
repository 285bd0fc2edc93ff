from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.model.embeddings import Embeddings
from fastbert.training.word_gradient import WordGradient

CONFIG = EncoderConfig(
    vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=8, pad_token_id=0
)
STEPS = ([7, 3, 3, 0, 49], [2, 7, 0, 0, 2])  # repeated ids and the padding id; the second step leaves rows of the first


def gradients(model: Embeddings, ids: list[int], seed: int) -> None:
    model.zero_grad()
    out = model(torch.tensor(ids), torch.arange(len(ids)))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)) * 3)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_rows_are_clipped_as_the_whole_table(max_norm: float) -> None:
    torch.manual_seed(0)
    plain, ours = Embeddings(CONFIG).eval(), Embeddings(CONFIG).eval()
    ours.load_state_dict(plain.state_dict())
    word = WordGradient(ours.word, sparse=True)
    for seed, ids in enumerate(STEPS):
        gradients(plain, ids, seed)
        gradients(ours, ids, seed)
        assert ours.word.weight.grad is not None and ours.word.weight.grad.is_sparse
        expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        norm = word.clip(ours.parameters(), max_norm)
        torch.testing.assert_close(norm, expected)
        for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert parameter.grad is not None and not parameter.grad.is_sparse
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
        word.clear()
        assert word.table is not None and not word.table.any()


def test_a_shared_table_stays_dense() -> None:
    model = Embeddings(CONFIG).eval()
    word = WordGradient(model.word, sparse=True)

    def shared() -> Tensor:
        out = model(torch.tensor([1, 2]), torch.arange(2))
        return (out @ model.word.weight.t()).square().sum()

    shared().backward()
    gradient = model.word.weight.grad
    assert gradient is not None and not gradient.is_sparse
    word.clip(model.parameters(), 1e-3)
    word.clear()
    assert word.table is None
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)
