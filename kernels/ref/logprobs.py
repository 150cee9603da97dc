"""Log-probabilities of given tokens, their ranks, and the likeliest ones."""

import torch

ROWS = 32  # of which ranks are counted at once: beside 256 rows' logits there is no room for as many answers


def logprobs(
    logits: torch.Tensor, targets: torch.Tensor, top_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [r, vocab], targets [r] int64 -> (logprobs [r], ranks [r] int64, top_ids [r, top_n] int64,
    top_logprobs [r, top_n]).

    Log-softmax in fp32; the top ones descend, and the order among equal ones is unspecified. The rank of a target is
    how many tokens are at least as likely, itself included.
    """
    own, ids, top = unranked(logits, targets, top_n)
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    ranks = [(part >= part.gather(1, wanted[:, None])).sum(1) for part, wanted in parts]
    return own, torch.cat(ranks), ids, top


def unranked(
    logits: torch.Tensor, targets: torch.Tensor, top_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without the ranks."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(top_n)
    return (logits.gather(1, targets[:, None]) - total).squeeze(1), ids, top - total
