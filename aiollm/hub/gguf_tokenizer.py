"""The tokenizer inside a GGUF file -> `tokenizer.json` and `tokenizer_config.json`.

GGUF stores the vocabulary and only *names* the way text is split before the merges (`tokenizer.ggml.pre`), so the
splitting rules are a table here. A wrong rule would quietly change every prompt: an unknown name is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiollm.hub.errors import HubError
from aiollm.text.ranks import GPT4, QWEN
from aiollm.text.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Model, Piece, build

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Split:
    """How a byte-level BPE cuts text into words: digits one by one or not, then a regex (None: that of GPT-2)."""

    digits: bool = False
    regex: str | None = None
    nfc: bool = False
    whole_words: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # where the file does not say


_WORD = r"[^\r\n\p{L}\p{N}]?"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_GPT4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_REST}"
_LLAMA3 = Split(regex=GPT4, whole_words=True, add_bos=True)
_QWEN2 = Split(regex=QWEN, nfc=True)
_DIGITS = Split(digits=True)
SPLITS = {
    "default": Split(),
    "gpt-2": Split(),
    "olmo": Split(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": Split(digits=True, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": Split(regex=GPT4),
    "chatglm-bpe": Split(regex=GPT4),
    "glm4": Split(regex=GPT4),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": Split(regex=QWEN),
    "tekken": Split(regex=_TEKKEN, whole_words=True),
    "gpt-4o": Split(regex=_GPT4O),
    "bloom": Split(regex=r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"),
}


def write_tokenizer(fields: Mapping[str, Any], folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) into `folder`.

    `context` is the model's length limit in tokens. Errors: HubError for a tokenizer that has no exact counterpart.
    """
    kind = fields.get("tokenizer.ggml.model")
    vocabulary = _vocabulary(fields)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(fields, vocabulary)
        _add_tokens(tokenizer, fields, vocabulary)
    elif kind == "llama":
        tokenizer, add_bos = _sentence_piece(fields, vocabulary)
    else:
        raise HubError(f"the GGUF tokenizer model {kind!r} is not supported, only 'gpt2' and 'llama'")
    named = {name: _token(fields, name) for name in ("bos", "eos", "unknown", "padding")}
    before = [named["bos"]] if fields.get("tokenizer.ggml.add_bos_token", add_bos) and named["bos"] else []
    after = [named["eos"]] if fields.get("tokenizer.ggml.add_eos_token", False) and named["eos"] else []
    _frame(tokenizer, [token for token in before if token], [token for token in after if token])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "unk_token": named["unknown"],
        "pad_token": named["padding"],
        "chat_template": fields.get("tokenizer.chat_template"),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps({key: value for key, value in settings.items() if value is not None}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def end_tokens(fields: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation: end of sequence, of turn, of message, as far as the file names them."""
    keys = ("eos", "eot", "eom")
    ids = [fields[f"tokenizer.ggml.{key}_token_id"] for key in keys if f"tokenizer.ggml.{key}_token_id" in fields]
    return list(dict.fromkeys(ids))


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise HubError("the GGUF file holds no vocabulary (tokenizer.ggml.tokens)")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise HubError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocabulary)} tokens twice")
    return vocabulary


def _token(fields: Mapping[str, Any], name: str) -> str | None:
    index = fields.get(f"tokenizer.ggml.{name}_token_id")
    tokens = fields["tokenizer.ggml.tokens"]
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise HubError(f"tokenizer.ggml.{name}_token_id is {index}, the vocabulary has {len(tokens)} tokens")
    token: str = tokens[index]
    return token


def _byte_level(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> tuple["Tokenizer", bool]:
    """Byte-level BPE with explicit merges, and whether a beginning token belongs in front by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise HubError(f"the GGUF pre-tokenizer {name!r} is not supported; known are {', '.join(SPLITS)}")
    split = SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", [])]
    if any(len(merge) != 2 for merge in merges):
        raise HubError("tokenizer.ggml.merges holds an entry that is not two tokens with a space between")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words)
    except Exception as error:  # noqa: BLE001  the binding raises bare Exception for a merge outside the vocabulary
        raise HubError(f"tokenizer.ggml.merges does not fit the vocabulary: {error}") from None
    tokenizer = Tokenizer(model)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentence_piece(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> tuple["Tokenizer", bool]:
    """SentencePiece BPE: the score of a piece is the rank of the merge that makes it, bytes stand in for the rest."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise HubError("the GGUF tokenizer 'llama' needs one score a token (tokenizer.ggml.scores)")
    pieces = [Piece(*piece) for piece in zip(vocabulary, scores, _token_types(fields, vocabulary), strict=True)]
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    return build(Model(pieces, dummy_prefix=prefix)), True


def _token_types(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(vocabulary))
    if not isinstance(types, list) or len(types) != len(vocabulary):
        raise HubError(f"tokenizer.ggml.token_type must have one entry for each of {len(vocabulary)} tokens")
    return types


def _add_tokens(tokenizer: "Tokenizer", fields: Mapping[str, Any], vocabulary: dict[str, int]) -> None:
    """Control tokens become special tokens, user-defined ones plain added tokens; both match in raw text."""
    from tokenizers import AddedToken

    types = _token_types(fields, vocabulary)
    control = [token for token, index in vocabulary.items() if types[index] in (CONTROL, UNKNOWN)]
    user = [token for token, index in vocabulary.items() if types[index] == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])


def _frame(tokenizer: "Tokenizer", before: list[str], after: list[str]) -> None:
    """Puts the tokens `before` and `after` around every encoded text."""
    from tokenizers import processors

    if not before and not after:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *[f"{token}:1" for token in before], "$B:1", *[f"{token}:1" for token in after]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])],
    )
