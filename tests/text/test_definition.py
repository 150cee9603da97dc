"""Every kind of tokenizer file encodes and decodes as the library that it belongs to, over hostile text."""

import base64
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken as library
from tiktoken import _educational as educational
from tiny_tokenizer import write_json

from aiollm.text import sentencepiece as spm
from aiollm.text.chat import ChatTemplate
from aiollm.text.definition import ADDITIONS
from aiollm.text.detokenizer import Detokenizer
from aiollm.text.folder import TextError
from aiollm.text.parsers.formats import MISTRAL_ARGS_FRAME, MISTRAL_FRAME, speech
from aiollm.text.ranks import GPT4, QWEN, STYLES, TEKKEN_SPECIAL
from aiollm.text.tokenizer import Tokenizer

CORPUS = [
    "The owl and the pussy-cat went to sea in a beautiful pea-green boat;", "they took some honey, and plenty of money",
    "wrapped up in a five-pound note. 12345 67890", "Der Fuchs über dem Fluß ißt Käse.", "你好世界 你好吗", "サーバー",
    "def f(x):\n    return x ** 2\n\n\n", "naïve café résumé", "Привет, мир!", "   indented    text\t\ttabs ",
]  # fmt: skip
HOSTILE = [
    "", " ", "  ", "\n", "a", " a", "a ", "  two  spaces  ", "👨‍👩‍👧🇫🇷🙂", "e\u0301a\u0308\u0323", "\u200b\u200d\ufeff",
    "سلام \u202eabc\u202c", "ﬁ ½ Å Å", "\x00\x01\x7f", "\ufffd", "\U0010ffff", "▁", "a▁b", "<0x41>", "<s", "'LL 'll",
    "é" * 40, "你" * 40, "\r\n\r\n", "\t\t x", "3.14159e-10 1000000",
]  # fmt: skip


def noise(rng: random.Random) -> str:
    """Random characters of many scripts, with blanks between."""
    ranges = [(32, 127), (32, 33), (10, 11), (0x80, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0x300, 0x370)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))


MARKS = re.compile("\r\n|[\u0300-\u036f]")
TEXTS = [*HOSTILE, *CORPUS, *(noise(random.Random(seed)) for seed in range(80))]


def train(**options: Any) -> bytes:
    """A small SentencePiece model."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=file, vocab_size=420, character_coverage=0.98,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return file.getvalue()


def ranks(pattern: str) -> dict[bytes, int]:
    return educational.bpe_train("\n".join(CORPUS * 2), 330, pattern, visualise=None)


def write_sentencepiece(folder: Path, **options: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(train(byte_fallback=True, **options))
    return folder


def write_tiktoken(folder: Path, name: str = "qwen.tiktoken", kind: str = "QWenTokenizer") -> Path:
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for word, rank in ranks(STYLES[kind].pattern).items()]
    (folder / name).write_text("".join(lines))
    write_json(folder, "tokenizer_config.json", {"tokenizer_class": kind})
    return folder


def write_tekken(folder: Path, version: str = "v7", special: bool = True, first: int = 24) -> Path:
    words = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for word, rank in ranks(GPT4).items()
    ]
    beyond = {"rank": len(words), "token_bytes": base64.b64encode(b"never used").decode(), "token_str": "never used"}
    listed = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(TEKKEN_SPECIAL)]
    settings = {
        "pattern": GPT4, "num_vocab_tokens": 999, "default_vocab_size": len(words) + first,
        "default_num_special_tokens": first, "version": version,
    }  # fmt: skip
    file = {"config": settings, "vocab": [*words, beyond]} | ({"special_tokens": listed} if special else {})
    write_json(folder, "tekken.json", file)
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "sentencepiece BPE": lambda folder: write_sentencepiece(folder, model_type="bpe"),
    "sentencepiece unigram": lambda folder: write_sentencepiece(folder, model_type="unigram"),
    "tiktoken": write_tiktoken,
    "tekken": write_tekken,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))))


def test_streaming_decode_is_whole_decode_for_every_kind(tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    special = sorted(tokenizer.eos_ids)
    for text in TEXTS:
        ids = tokenizer.encode(text, True)
        mixed = [*ids, *(rng.randrange(tokenizer.vocab_size + 2) for _ in range(10)), *special, *ids[::-1]]
        for sequence in (ids, mixed):
            for skip in (True, False):
                detokenizer, at, found = Detokenizer(tokenizer, (), skip), 0, ""
                while at < len(sequence):
                    step = rng.randrange(1, 4)
                    piece = detokenizer.push(sequence[at : at + step])
                    assert not piece.endswith("\ufffd") or "\ufffd" in tokenizer.decode(sequence, skip)
                    found, at = found + piece, at + step
                assert found + detokenizer.finish() == tokenizer.decode(sequence, skip)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": True, "user_defined_symbols": ["<|user|>", "▁▁▁▁"], "control_symbols": ["<|end|>"]},
    ],
    ids=["identity", "no prefix", "nfkc", "symbols"],
)
def test_sentencepiece_files_encode_and_decode_as_sentencepiece(kind: str, options: dict[str, Any]) -> None:
    data = train(model_type=kind, **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = Tokenizer(spm.build(spm.parse(data)).to_str().encode())
    assert tokenizer.vocab_size == reference.vocab_size()
    mapped = options.get("normalization_rule_name") != "identity"
    for text in TEXTS:
        if (mapped and MARKS.search(text)) or (kind == "unigram" and "<0x41>" in text):
            continue  # where the tokenizers library is another
        ids = reference.encode(text)
        assert tokenizer.encode(text, False) == ids, repr(text)
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen.tiktoken", "QWenTokenizer"), ("tokenizer.model", "ChatGLM4Tokenizer"), ("tiktoken.model", "QWenTokenizer")],
)
def test_tiktoken_files_encode_and_decode_as_tiktoken(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = Tokenizer.load(str(write_tiktoken(tmp_path, name, kind)))
    style, mergeable = STYLES[kind], ranks(STYLES[kind].pattern)
    special = {text: len(mergeable) + number for number, text in enumerate(style.special)}
    reference = library.Encoding("tiny", pat_str=style.pattern, mergeable_ranks=mergeable, special_tokens=special)
    for text in TEXTS:
        if not style.nfc:
            assert tokenizer.encode(text, False) == reference.encode(text, disallowed_special=())
        ids = tokenizer.encode(text, False)
        assert tokenizer.decode(ids) == reference.decode(ids)
    for text, index in special.items():
        assert tokenizer.encode(text, False) == [index] and tokenizer.is_special(index)


@pytest.mark.parametrize("special", [True, False], ids=["listed", "by default"])
def test_tekken_files_encode_and_decode_as_tiktoken_behind_their_special_tokens(tmp_path: Path, special: bool) -> None:
    tokenizer = Tokenizer.load(str(write_tekken(tmp_path, special=special)))
    reference = library.Encoding("tiny", pat_str=GPT4, mergeable_ranks=ranks(GPT4), special_tokens={})
    for text in TEXTS:
        ids = [24 + index for index in reference.encode(text, disallowed_special=())]
        assert tokenizer.encode(text, False) == ids
        assert tokenizer.encode(text, True) == [1, *ids]  # <s>
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("[INST]a[/INST]</s><SPECIAL_23>", False)[::2] == [3, 4, 23]
    assert tokenizer.eos_ids == {2} and tokenizer.vocab_size == 24 + 330


def test_qwen_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_tiktoken(tmp_path)))
    assert tokenizer.encode("e\u0301", False) == tokenizer.encode("é", False)


def test_a_sentencepiece_folder_says_bos_and_eos_and_adds_bos_unless_told_otherwise(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="bpe")
    tokenizer = Tokenizer.load(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.encode("a", True) == [1, *tokenizer.encode("a", False)]
    write_json(tmp_path, "tokenizer_config.json", {"add_bos_token": False})
    assert 1 not in Tokenizer.load(str(tmp_path)).encode("a", True)


def test_a_space_is_put_behind_special_tokens_only_in_legacy_folders(tmp_path: Path) -> None:
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    write_sentencepiece(tmp_path, model_type="bpe", **options)
    legacy = Tokenizer.load(str(tmp_path))
    write_json(tmp_path, "tokenizer_config.json", {"legacy": False})
    newer = Tokenizer.load(str(tmp_path))
    for text in TEXTS:
        if "<s" not in text and not text.startswith((" ", "▁")):
            assert newer.encode(text, False) == legacy.encode(text, False), repr(text)
            assert newer.decode(newer.encode(text, False)) == legacy.decode(legacy.encode(text, False))
    assert legacy.decode(legacy.encode("a</s>b", False), False) == "a</s> b"
    assert newer.decode(newer.encode("a</s>b", False), False) == "a</s>b"


def test_added_tokens_of_a_folder_are_added(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="bpe")
    size = Tokenizer.load(str(tmp_path)).vocab_size
    added = {
        str(size + 1): {"content": "<|b|>", "special": False}, str(size): {"content": "<|a|>", "special": True},
        "2": {"content": "</s>", "special": True},
    }  # fmt: skip
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    write_json(tmp_path, "added_tokens.json", {"<|c|>": size + 2})
    tokenizer = Tokenizer.load(str(tmp_path))
    ids = tokenizer.encode("<|a|><|b|><|c|>", False)
    assert [index for index in ids if index >= size] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids, True) == "<|b|><|c|>" and tokenizer.decode(ids, False) == "<|a|><|b|><|c|>"
    write_json(tmp_path, "added_tokens.json", {"<|c|>": 5})
    with pytest.raises(TextError, match=r"'<\|c\|>' has the id 5, which is not free"):
        Tokenizer.load(str(tmp_path))


def test_chatglm_s_own_tokens_stand_behind_its_vocabulary_and_before_each_text(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="bpe")
    size = Tokenizer.load(str(tmp_path)).vocab_size
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "ChatGLMTokenizer"})
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.vocab_size == size + len(ADDITIONS["ChatGLMTokenizer"].special)
    assert tokenizer.encode("a", True) == [size + 1, size + 3, *tokenizer.encode("a", False)]


def test_mistral_s_template_of_version_7_is_known(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hu"},
    ]  # fmt: skip
    template = ChatTemplate.load(str(write_tekken(tmp_path)))
    assert template.render(messages) == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]Ho</s>[INST]Hu[/INST]"
    )
    with pytest.raises(TextError, match="no chat template"):
        ChatTemplate.load(str(write_tekken(tmp_path, "v3"))).render(messages)


# The layouts are those of mistral-common's InstructTokenizerV7, V11 and V13.
@pytest.mark.parametrize(
    ("version", "first", "last", "call", "result"),
    [
        ("v7", "", "{tools}", '[TOOL_CALLS][{"name": "f", "arguments": {"é": 1}, "id": "c1"}, '
         '{"name": "g", "arguments": {}}]', "[TOOL_RESULTS]c1[TOOL_CONTENT]21 °C[/TOOL_RESULTS]"),
        ("v11", "", "{tools}", '[TOOL_CALLS]f[CALL_ID]c1[ARGS]{"é": 1}[TOOL_CALLS]g[ARGS]{}',
         "[TOOL_RESULTS]c1[TOOL_CONTENT]21 °C[/TOOL_RESULTS]"),
        ("v13", "{tools}", "", '[TOOL_CALLS]f[ARGS]{"é": 1}[TOOL_CALLS]g[ARGS]{}',
         "[TOOL_RESULTS]21 °C[/TOOL_RESULTS]"),
    ],
)  # fmt: skip
def test_tools_calls_and_results_are_written_as_mistral_s_version_has_them(
    tmp_path: Path, version: str, first: str, last: str, call: str, result: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
    listed = (
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "é", "parameters": '
        '{"type": "object"}}}][/AVAILABLE_TOOLS]'
    )
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "same"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"é": 1}'}},
            {"id": "null", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "same"},
    ]  # fmt: skip
    template = ChatTemplate.load(str(write_tekken(tmp_path, version)))
    expected = (
        f"<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT]{first.format(tools=listed)}[INST]same[/INST]{call}</s>{result}"
        f"Warm.</s>{last.format(tools=listed)}[INST]same[/INST]"
    )
    assert template.render(messages, tools=tools) == expected
    assert template.render(messages) == expected.replace(listed, "")
    with pytest.raises(TextError, match="tools need a message of the role user"):
        template.render(messages[:1], tools=tools)
    calls = speech(template.source, "auto", "none").calls
    assert calls is not None and calls.frame == (MISTRAL_FRAME if version == "v7" else MISTRAL_ARGS_FRAME)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.model", b"", "it has no pieces"),
        ("tokenizer.model", b"\xff" * 40, "no SentencePiece model"),
        ("tokenizer.model", train(model_type="bpe")[:-5], "ends within the field"),
        ("tokenizer.model", train(model_type="word"), "of type 3 are not supported"),
        ("tokenizer.model", train(model_type="bpe", treat_whitespace_as_suffix=True), "spaces behind words"),
        ("qwen.tiktoken", b"IQ== 0\nIg== x\n", "line 2 is not base64 and a rank"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 2\n", "ranks are not 0, 1, 2"),
        ("tekken.json", b"{}", "tekken.json is damaged"),
        ("tekken.json", b"[", "tekken.json is damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    with pytest.raises(TextError, match=f"{name}: .*{message}"):
        Tokenizer.load(str(tmp_path))


def test_a_tiktoken_file_of_unknown_words_is_refused(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NewTokenizer"}))
    with pytest.raises(TextError, match="'NewTokenizer' is not known; known are QWenTokenizer"):
        Tokenizer.load(str(tmp_path))


def test_qwen_s_words_differ_from_gpt_4_s_in_digits_only() -> None:
    assert QWEN != GPT4 and QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|") == GPT4
