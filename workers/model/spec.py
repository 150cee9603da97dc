"""What a decoder is: the values that tell one model from another."""

from dataclasses import dataclass

from aiollm.workers.model.rotary import Rope


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm transformer decoder with grouped-query attention and a SwiGLU layer in every block."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    norm_eps: float
    rope: Rope
    tied_head: bool  # the output layer is the embedding
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_position")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot be shared out among {self.kv_heads} KV heads")
        if self.rope.dim > self.head_dim or self.rope.dim % 2:
            raise ValueError(f"cannot rotate {self.rope.dim} of {self.head_dim} dimensions")
