"""The values that name a step's tensors: what the decoder computes (Batch) and how rows are sampled (Sampling).

Every tensor lies on the step's device. A *row* is a running request's index into the state tables; a *slot* is the
place of one token's keys and values in the KV pool.
"""

from typing import Any, NamedTuple

import torch


class Batch(NamedTuple):
    """The new tokens of one step, packed row after row: decode rows bring one token, prefill chunks bring many."""

    rows: torch.Tensor  # [n] int64: the row of each sequence
    starts: torch.Tensor  # [n + 1] int32: where each sequence's new tokens begin on the packed axis
    lengths: torch.Tensor  # [n] int32: cached tokens plus new ones, after this step
    positions: torch.Tensor  # [tokens] int64: position of each new token in its sequence
    slots: torch.Tensor  # [tokens] int64: KV slot that each new token is stored in
    slot_table: torch.Tensor  # [max_rows, max_length] int32: slot of (row, position)
    max_new: int  # largest number of new tokens of one sequence
    max_length: int  # largest of `lengths`
    plan: Any = None  # what `Ops.plan` laid out for the attention of its table
    windowed: tuple["Batch", ...] = ()  # the same tokens for each group of layers with a window, which sees but the end


class Sampling(NamedTuple):
    """How to draw one token for each of r sequences: columns of the step, and the tables that `rows` points into.

    What comes before `prompt_lengths` counts for the repetition penalty alone; 0 has prompts count as what is generated
    does, and -n leaves the first n tokens out of every penalty.

    Bias is listed sequence by sequence and carries the masks of min_tokens (-inf) as well; what lies past the last of
    `bias_starts` is never read, so a graph keeps room for as many entries as it may get.
    """

    rows: torch.Tensor  # [r] int64: the row of each sequence
    lengths: torch.Tensor  # [r] int64: tokens known so far = position of the token to draw
    temperature: torch.Tensor  # [max_rows] float32; 0 is greedy
    top_p: torch.Tensor  # [max_rows] float32 in (0, 1]; 1 is off
    top_k: torch.Tensor  # [max_rows] int32; 0 is off
    min_p: torch.Tensor  # [max_rows] float32 in [0, 1]; 0 is off
    presence: torch.Tensor  # [max_rows] float32; 0 is off; counts generated tokens
    frequency: torch.Tensor  # [max_rows] float32; 0 is off; counts generated tokens
    repetition: torch.Tensor  # [max_rows] float32 > 0; 1 is off; counts prompt and generated tokens
    seeds: torch.Tensor  # [max_rows] int64
    prompt_lengths: torch.Tensor  # [max_rows] int64: where generated tokens begin in `tokens`, see above
    tokens: torch.Tensor  # [max_rows, max_length] int32: token history of (row, position)
    bias_starts: torch.Tensor  # [r + 1] int32: where the entries of each sequence begin
    bias_ids: torch.Tensor  # [at least b] int64 token ids
    bias_values: torch.Tensor  # [at least b] float32, added to the logits
    masks: torch.Tensor  # [m, ceil(vocab / 32)] int32: bit i % 32 of word i / 32 is set where token i is allowed
    mask_lines: torch.Tensor  # [r] int32: the line of `masks` that holds for each sequence; -1 where none does
    top_n: int  # how many alternatives are reported with their logprobs


class Sampled(NamedTuple):
    """What a sampling op returns for r sequences."""

    tokens: torch.Tensor  # [r] int64; -1 where the logits were not finite
    logprobs: torch.Tensor  # [r] float32: log-softmax of the raw logits at the drawn token
    top_ids: torch.Tensor  # [r, top_n] int64
    top_logprobs: torch.Tensor  # [r, top_n] float32, of the raw logits, descending
