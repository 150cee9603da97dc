"""Vocabularies of byte strings in the order of their merges: tiktoken files, and Mistral's tekken.json.

Merging two neighbours is allowed where their joined bytes are a token, the lowest rank first; a word that is a token is
taken whole. How text is cut into words stands in tekken.json; of tiktoken files only the code that came with them says
it, so those that are known are a table here.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aiollm.text.folder import TextError
from aiollm.text.pieces import BYTE_ALPHABET, NOT_A_BYTE

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace("{1,3}", "")
LETTERS = {byte: chr(code) for code, byte in BYTE_ALPHABET.items() if byte != NOT_A_BYTE}


class Style(NamedTuple):
    """What the code of a model does around its tiktoken file."""

    pattern: str  # the words of a text
    nfc: bool = False
    special: Sequence[str] = ()  # behind the vocabulary, where no file names them


_EXTRA = [f"<|extra_{number}|>" for number in range(205)]
_RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(251)]
_LLAMA3 = [
    "<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>", _RESERVED[4],
    "<|eot_id|>", *_RESERVED[5:],
]  # fmt: skip
# By `tokenizer_class` of tokenizer_config.json, or where there is none by `model_type` of config.json.
STYLES = {
    "QWenTokenizer": Style(QWEN, nfc=True, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_EXTRA]),
    "ChatGLM4Tokenizer": Style(GPT4),
    "llama": Style(GPT4, special=_LLAMA3),
}


class _Entry(msgspec.Struct):
    rank: int
    token_bytes: str


class _Special(msgspec.Struct):
    rank: int
    token_str: str


class _Settings(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int


class _Tekken(msgspec.Struct):
    config: _Settings
    vocab: list[_Entry]
    special_tokens: list[_Special] | None = None


# Of files that do not list them.
TEKKEN_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip


def is_tiktoken(data: bytes) -> bool:
    """Whether a file called tokenizer.model is in truth tiktoken's: its first line is base64, a blank, a rank."""
    word, _, rank = data.partition(b"\n")[0].partition(b" ")
    return bool(word) and rank.strip().isdigit()


def tiktoken(data: bytes, style: Style) -> Tokenizer:
    """A tiktoken file: lines of base64 and rank, which is the token id. Raises TextError where it is damaged."""
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                word, rank = line.split()
                ranks[base64.b64decode(word, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise TextError(f"line {len(ranks) + 1} is not base64 and a rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TextError("its ranks are not 0, 1, 2, ...")
    special = {token: len(ranks) + number for number, token in enumerate(style.special)}
    return _build(ranks, special, style.pattern, style.nfc)


def tekken(data: bytes) -> Tokenizer:
    """A tekken.json: special tokens have the first ids. Raises TextError where it is damaged."""
    try:
        file = msgspec.json.decode(data, type=_Tekken)
        settings, first = file.config, file.config.default_num_special_tokens
        words = file.vocab[: settings.default_vocab_size - first]
        ranks = {base64.b64decode(entry.token_bytes, validate=True): first + entry.rank for entry in words}
    except (msgspec.MsgspecError, ValueError) as error:
        raise TextError(f"tekken.json is damaged: {error}") from error
    if sorted(ranks.values()) != list(range(first, first + len(ranks))):
        raise TextError("tekken.json is damaged: its ranks are not 0, 1, 2, ...")
    listed = {entry.rank: entry.token_str for entry in file.special_tokens or ()} or dict(enumerate(TEKKEN_SPECIAL))
    special = {listed.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(first)}
    return _build(ranks, special, settings.pattern, False)


def style_of(config: Mapping[str, Any], model: Mapping[str, Any]) -> Style:
    """By tokenizer_config.json and config.json. Raises TextError for a model whose words are not known."""
    name = config.get("tokenizer_class") or model.get("model_type")
    name = name if name in STYLES else model.get("model_type")
    if name not in STYLES:
        raise TextError(
            f"it does not say how text is cut into words, and {config.get('tokenizer_class') or name!r} is not known; "
            f"known are {', '.join(STYLES)}; AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers "
            "writes a tokenizer.json"
        )
    return STYLES[name]


def _build(ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str, nfc: bool) -> Tokenizer:
    words = {word: "".join(map(LETTERS.__getitem__, word)) for word in ranks}
    merges = []
    for word, rank in ranks.items():
        pairs = ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        found = [(ranks[left], ranks[right], left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += [(rank, *pair) for pair in found]
    merges.sort(key=lambda merge: merge[:3])
    vocabulary = {words[word]: rank for word, rank in ranks.items()} | dict(special)
    model = models.BPE(
        vocab=vocabulary,
        merges=[(words[left], words[right]) for _, _, _, left, right in merges],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
