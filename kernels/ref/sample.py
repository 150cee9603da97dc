"""Draw the next token of each row."""

import torch

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.ref.logprobs import unranked
from aiollm.kernels.ref.random import uniform

_TABLES = (
    "temperature", "top_p", "top_k", "min_p", "presence", "frequency", "repetition", "seeds", "prompt_lengths",
    "tokens",
)  # fmt: skip


def sample(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    """logits [r, vocab] of any floating type -> Sampled. Each row's result is a function of that row alone.

    In this order: bias is added; masked tokens become impossible; penalties; temperature 0 takes the argmax (the lowest
    id among equals); else temperature, top_k, top_p over what top_k left, min_p relative to the likeliest token; one
    uniform number of (seed, length) is inverted through the cumulative distribution of the kept tokens in vocabulary
    order. Among equal logits top_k and top_p keep the lower ids. Reported logprobs are those of the unprocessed logits.
    The token is -1, and its logprob meaningless, where the logits hold NaN or +inf or the processed ones leave no token
    possible.
    """
    logits, rows = logits.float(), gathered(sampling)
    processed = penalize(add_bias(logits, rows), rows)
    peak = processed.amax(-1)
    drawn = _draw(processed, rows)
    tokens = torch.where(rows.temperature > 0, drawn, processed.argmax(-1))
    return Sampled(torch.where(peak.isfinite(), tokens, -1), *unranked(logits, tokens, rows.top_n))


def gathered(sampling: Sampling) -> Sampling:
    """The same with tables of r rows: row i is that of sequence i."""
    tables = {name: getattr(sampling, name)[sampling.rows] for name in _TABLES}
    return sampling._replace(rows=torch.arange(len(sampling.rows), device=sampling.rows.device), **tables)


def add_bias(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Add each bias entry to its logit, where those of one token add up, and -inf to tokens that a mask forbids."""
    entries = torch.arange(len(sampling.bias_ids), device=logits.device)
    listed = entries < sampling.bias_starts[-1]
    index = torch.searchsorted(sampling.bias_starts[1:], entries, right=True, out_int32=True)
    biased = logits.index_put((index[listed], sampling.bias_ids[listed]), sampling.bias_values[listed], accumulate=True)
    if not len(sampling.masks):
        return biased
    ids = torch.arange(logits.shape[1], device=logits.device)
    allowed = (sampling.masks[sampling.mask_lines.clamp(min=0)][:, ids // 32] >> (ids % 32)) & 1
    return torch.where((allowed == 1) | (sampling.mask_lines < 0)[:, None], biased, biased - torch.inf)


def penalize(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Repetition (Keskar et al., 2019) over all known tokens, then frequency and presence over the generated ones.

    Where `prompt_lengths` is 0 prompt tokens count as generated ones; where it is -n the first n tokens do not count.
    The tables of `sampling` are those of the r sequences themselves, as `gathered` gives them.
    """
    vocab = logits.shape[1]
    history = sampling.tokens.long()  # [r, max_length]
    position = torch.arange(history.shape[1], device=logits.device)
    prompt = sampling.prompt_lengths[:, None]
    known = (position < sampling.lengths[:, None]) & (position >= -prompt) & (history >= 0) & (history < vocab)
    generated = known & (position >= prompt)
    history = history.where(known, 0)
    zeros = torch.zeros_like(logits)
    seen = zeros.scatter_add(1, history, known.float()) > 0
    counts = zeros.scatter_add(1, history, generated.float())
    repetition = sampling.repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits * (1 / repetition), logits * repetition), logits)
    return logits - sampling.frequency[:, None] * counts - sampling.presence[:, None] * (counts > 0)


def _draw(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Processed logits [r, vocab] -> tokens [r]. Rows of temperature 0 get any token."""
    temperature = sampling.temperature.where(sampling.temperature > 0, 1.0)[:, None]
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = (shifted / temperature).exp().nan_to_num(0.0)  # relative to the likeliest token's
    ids = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None])
    sorted_weights = weights.gather(1, ids)
    mass = sorted_weights.where(kept, 0.0).cumsum(-1, dtype=torch.float64)
    kept &= mass - sorted_weights < sampling.top_p[:, None] * mass[:, -1:]  # the mass before this token is too small
    kept = torch.zeros_like(kept).scatter(1, ids, kept) & (shifted >= temperature * sampling.min_p[:, None].log())
    cumulative = weights.where(kept, 0.0).cumsum(-1, dtype=torch.float64)
    target = uniform(sampling.seeds, sampling.lengths)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)
    return drawn.squeeze(1).clamp(max=logits.shape[1] - 1)  # a row without a finite logit has no mass to find
