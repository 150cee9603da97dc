"""What a step computes, and where to: gathered from the tables of the rows."""

import torch


def inputs(
    rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, slot_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows, positions [n] int64; tokens, slot_table [max_rows, max_length] int32 -> (ids, slots), [n] int64 each.

    ids[i] is the token at (rows[i], positions[i]), and slots[i] the KV slot that it is stored in.
    """
    return tokens[rows, positions].long(), slot_table[rows, positions].long()
