"""Greedy tokens beside the logits of transformers in fp32."""

from typing import Any

import torch


def assert_likeliest(model: Any, prompt: list[int], output: list[int], bound: float = 1e-4) -> int:
    """Each token is the likeliest one behind those before it; so is one whose logit is not lower by more than `bound`
    of the largest logit's size, as rounding may swap the two. The value is how many are such.

    So two outputs for one prompt part only at tokens that lie so near to each other.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0][len(prompt) - 1 : -1]
    behind = logits.amax(1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert len(output) and bool(behind.max() <= bound * logits.abs().max())
    return int((behind > 0).sum())
