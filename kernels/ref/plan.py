"""What one step's attention can lay out once, before the first layer."""

from aiollm.kernels.batch import Batch


def plan(batch: Batch, kv_heads: int) -> Batch:
    """The batch, with what this table's attention wants to find in `batch.plan` for pools of kv_heads heads.

    The reference wants nothing. Attention also takes a batch without a plan. A plan that is there already is that of
    the same sequences in other slots.
    """
    return batch
