"""Small real tokenizers for tests, written as model folders.

In the byte tokenizer a token id is the value of its byte, so `list(text.encode())` is what it encodes `text` to.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TEXT, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 259


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a ByteLevel vocabulary, by byte value."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(0x100 + moved.index(byte)) for byte in range(256)]


def write_byte_tokenizer(folder: Path, chat_template: str | None = CHATML, special: Sequence[str] = ()) -> Path:
    """256 bytes (id = byte), then <|endoftext|>, <|im_start|>, <|im_end|> and what else is `special`.

    EOS is <|im_end|>, there is no BOS.
    """
    tokenizer = Tokenizer(models.BPE(vocab={token: byte for byte, token in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder, "tokenizer_config.json", config | ({"chat_template": chat_template} if chat_template else {}))
    return folder


def write_sentencepiece_tokenizer(folder: Path, strip: bool = True) -> Path:
    """Llama style: <unk>, <s>, </s>, the byte tokens <0x00>..<0xFF> as ids 3..258, then some pieces with "▁"."""
    pieces = ["▁", "▁H", "e", "l", "o", "▁w", "r", "d", "▁▁", "你", "é", "H"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + index for index, piece in enumerate(pieces)}
    merges = [("▁", "H"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    write_json(folder, "tokenizer_config.json", config)
    return folder


def write_wordpiece_tokenizer(folder: Path) -> Path:
    """BERT style: a token's text depends on its neighbours. [CLS] and [SEP] are special."""
    words = ["[UNK]", "[CLS]", "[SEP]", "un", "##know", "##n", "words", ",", "and", "你", "é"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
