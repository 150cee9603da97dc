"""From the files of a model folder to one definition of its tokenizer, whatever kind they are.

    tokenizer.json                       as it is
    tekken.json                          Mistral's own           ranks.py
    *.tiktoken, tokenizer.model          of tiktoken             ranks.py
    tokenizer.model, tokenizer.model.v*  of SentencePiece        sentencepiece.py

The code that came with a model is never run; what is known of it stands in tables.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tokenizers import AddedToken, Tokenizer, processors

from aiollm.text import ranks, sentencepiece
from aiollm.text.folder import TextError, read_json


class Definition(NamedTuple):
    """`text` is that of a tokenizer.json; the rest counts where the folder's other files say nothing."""

    text: bytes
    named: Mapping[str, str] = {}  # special tokens by name
    add_bos: bool = False


class Addition(NamedTuple):
    """What the code of a tokenizer class adds to its vocabulary."""

    special: Sequence[str] = ()  # behind it
    prefix: Sequence[str] = ()  # before each text


ADDITIONS = {
    "ChatGLMTokenizer": Addition(
        ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        ["[gMASK]", "sop"],
    ),
    "ChatGLM4Tokenizer": Addition((), ["[gMASK]", "<sop>"]),
}
ENDS = {"bos_token": ["<s>", "<|begin_of_text|>"], "eos_token": ["</s>", "<|end_of_text|>", "<|endoftext|>"]}


class _Added(msgspec.Struct):
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def definition(folder: str) -> Definition:
    """Raises TextError where the folder has no tokenizer, or one that cannot be read; it names the file."""
    at = Path(folder)
    whole, own = at / "tokenizer.json", at / "tekken.json"
    if whole.is_file():
        return Definition(whole.read_bytes())
    config, model = read_json(folder, "tokenizer_config.json"), read_json(folder, "config.json")

    def tiktoken(data: bytes) -> Tokenizer:
        return ranks.tiktoken(data, ranks.style_of(config, model))

    def either(data: bytes) -> Tokenizer:
        if ranks.is_tiktoken(data):
            return tiktoken(data)
        # What transformers calls legacy puts a space behind special tokens as well.
        return sentencepiece.build(sentencepiece.parse(data)._replace(prefix_once=config.get("legacy") is False))

    if own.is_file():
        tokenizer = _read(own, ranks.tekken)
    elif path := _first(at, "*.tiktoken", "tiktoken.model"):
        tokenizer = _read(path, tiktoken)
    elif path := _first(at, "tokenizer.model", "tokenizer.model.v*", "*.spm", "sentencepiece.bpe.model"):
        tokenizer = _read(path, either)
    else:
        raise TextError(
            f"{folder} has no tokenizer: none of tokenizer.json, tekken.json, tokenizer.model and *.tiktoken is there; "
            "for vocab.json and merges.txt AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers "
            "writes a tokenizer.json"
        )
    addition = ADDITIONS.get(config.get("tokenizer_class", ""), Addition())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in addition.special])
    _add(tokenizer, folder, config)
    _frame(tokenizer, addition.prefix)
    named = {
        name: next((text for text in texts if tokenizer.token_to_id(text) is not None), "")
        for name, texts in ENDS.items()
    }
    starts = not addition.prefix and bool(named["bos_token"])
    return Definition(tokenizer.to_str().encode(), {name: text for name, text in named.items() if text}, starts)


def _first(folder: Path, *patterns: str) -> Path | None:
    """The first file that one of the patterns finds."""
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()), None)


def _read(path: Path, build: Callable[[bytes], Tokenizer]) -> Tokenizer:
    try:
        return build(path.read_bytes())
    except TextError as error:
        raise TextError(f"{path}: {error}") from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TextError(f"{path}: the vocabulary cannot be used: {error}") from error


def _add(tokenizer: Tokenizer, folder: str, config: Mapping[str, Any]) -> None:
    """The tokens of tokenizer_config.json and added_tokens.json. Raises TextError where one has an id of another."""
    try:
        found = msgspec.convert(config.get("added_tokens_decoder", {}), dict[int, _Added], strict=False)
        plain = msgspec.convert(read_json(folder, "added_tokens.json"), dict[str, int])
    except msgspec.ValidationError as error:
        raise TextError(f"{folder}: the added tokens cannot be read: {error}") from error
    found = {index: _Added(text) for text, index in plain.items()} | found
    for index, token in sorted(found.items()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        there = tokenizer.token_to_id(token.content)
        if there is None and index == tokenizer.get_vocab_size():
            there = index
        if there != index:
            raise TextError(f"{folder}: the added token {token.content!r} has the id {index}, which is not free")
        add([
            AddedToken(
                token.content,
                special=token.special,
                normalized=token.normalized,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
        ])  # fmt: skip


def _frame(tokenizer: Tokenizer, prefix: Sequence[str]) -> None:
    """Put the tokens `prefix` before every text, where the vocabulary has them."""
    ids = [(token, tokenizer.token_to_id(token)) for token in prefix]
    if ids and all(index is not None for _, index in ids):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"], pair=[*prefix, "$A", "$B:1"], special_tokens=ids
        )
