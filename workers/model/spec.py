"""What a decoder is: the values that tell one model from another."""

from dataclasses import dataclass
from typing import Literal

from aiollm.workers.model.rotary import Rope

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A transformer decoder: blocks of attention and a feed-forward layer, each added to a residual stream.

    The defaults are those of Llama: each of the two layers of a block is x + layer(norm(x)), norms divide by the root
    of the mean square, the feed-forward layer is down(activation(gate(x)) * up(x)). A factor m on what the layers add
    needs no field: the stream divided by m is that of a model without it, whose embedding scale is divided by m and
    whose norm_eps by m^2.

    `qk_norm` norms queries and keys before they are rotated: "head" norms each head and has one weight [head_dim] for
    all of them, "heads" has one for each of them, "width" norms all heads of the queries, and all of the keys, as one
    vector.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    norm_eps: float
    rope: Rope | None  # None: queries and keys are not rotated
    tied_head: bool  # the output layer is the embedding

    # Norms
    centered: bool = False  # layer norm: the row's mean is taken off first
    norm_bias: bool = False  # in the blocks' norms and the final one; those of heads have none
    unit_offset: bool = False  # norms multiply by 1 + weight
    pre_norm: bool = True  # a layer reads norm(x)
    post_norm: bool = False  # norm(layer(x)) is added to x, with a weight of its own
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)), with one norm

    # Attention
    qk_norm: Literal["head", "heads", "width"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    attention_scale: float | None = None  # of the products of queries and keys; None is head_dim ** -0.5
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0 is off
    alibi: bool = False  # scores fall with distance, each head's by a slope of its own (Press et al., 2022)
    window: int = 0  # how many positions a query sees, its own included; 0 is all before it
    global_layers: frozenset[int] = frozenset()  # layers that have no window, and `global_rope` in place of `rope`
    global_rope: Rope | None = None

    # Feed-forward layer
    activation: Activation = "silu"
    gated: bool = True  # otherwise it is down(activation(up(x)))
    mlp_bias: bool = False

    # Ends
    embedding_scale: float = 1.0  # of embeddings; the output layer that is tied to them has it not
    embedding_norm: bool = False
    learned_positions: bool = False  # a vector for each position is added to the embedding
    normalized_head: bool = False  # each row of the output layer has length 1
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # logits become cap * tanh(logit / cap); 0 is off
    reward: Literal["linear", "mlp"] | None = None  # one score in place of logits: see workers.model.reward
    reward_token: int | None = None  # stands behind the text, and is where the score is read

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_position")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot be shared out among {self.kv_heads} KV heads")
        for rope in (self.rope, self.global_rope):
            if rope and (rope.dim > self.head_dim or rope.dim % 2 or rope.dim < 2):
                raise ValueError(f"cannot rotate {rope.dim} of {self.head_dim} dimensions")
        if self.parallel and (self.post_norm or not self.pre_norm):
            raise ValueError("parallel layers share the norm before them, and have none behind")

    def reach(self, layer: int) -> tuple[Rope | None, int]:
        """The rotation and the window of one layer."""
        return (self.global_rope, 0) if layer in self.global_layers else (self.rope, self.window)
