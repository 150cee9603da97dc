"""What tokens are as text: grammars speak of bytes, and a worker has no tokenizer."""

import msgspec


class Vocabulary(msgspec.Struct, frozen=True):
    """`pieces` are the bytes of each id, empty where it has none of its own."""

    pieces: list[bytes]
    special: list[int]
    """Ids that no text means: beginnings, ends of turns."""
    eos: list[int]
    """Ids that end an output."""
