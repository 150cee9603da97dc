import pytest
import torch

from aiollm.kernels.ref.logprobs import logprobs
from aiollm.kernels.tolerance import assert_close


@pytest.mark.parametrize("rows", [0, 1, 63])
def test_equals_log_softmax(rows: int) -> None:
    logits = torch.randn(rows, 97, generator=torch.Generator().manual_seed(0)) * 5
    targets = torch.arange(rows) % 97
    expected = logits.double().log_softmax(-1).float()
    chosen, ids, top = logprobs(logits, targets, 5)
    assert_close(chosen, expected.gather(1, targets[:, None]).squeeze(1))
    assert_close(top, expected.topk(5).values)
    assert torch.equal(ids, expected.topk(5).indices)


def test_no_alternatives_and_banned_tokens() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    chosen, ids, top = logprobs(logits, torch.tensor([1]), 0)
    assert chosen.tolist() == [float("-inf")]
    assert ids.shape == top.shape == (1, 0)
