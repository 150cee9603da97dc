"""Grammars by llguidance: what the server checks and what a worker draws by is made here, from the same text."""

import json
import re
import sys
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance._lib import LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

from aiollm.grammar.schema import SchemaError, followed
from aiollm.wire.sampling import Grammar, Tag, Thoughts
from aiollm.wire.vocabulary import Vocabulary

# A model that has nothing to say fills its answer with white space: longer runs are not JSON here.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# Texts are not forced through one way of cutting them into tokens: the model cuts as it was trained to.
HEAD = '%llguidance {"no_forcing": true}\n'
OPTIONS = re.compile(r"^[ \t]*%llguidance.*$", re.MULTILINE)
SCHEMA = re.compile(r"(?<=%json)\s*(?=\{)")
IS_LARK = re.compile(r"^\s*(%llguidance\b|[?!]?start\s*:(?!:))", re.MULTILINE)
# In llama.cpp's syntax: a character by its number, or an escaped backslash, behind which no number begins.
NUMBERED = re.compile(r"\\(?:\\|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
# Where an error is, the grammar around it, and how a regular expression stands in its own error.
POSITION = re.compile(r"(?:at )?(?:(\d+)\(\d+\): )+")
LISTING = re.compile(r"\n +\d+ \| |; following special tokens|\n<non-verbose")
REGEX_ERROR = re.compile(r"(?<=regex parse error:)\n.*\nerror:", re.DOTALL)
JSON = json.JSONDecoder()
# A state of a lexer takes 1 to 2 kB.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class GrammarError(ValueError):
    """A grammar cannot be used, or what was drawn does not follow it; says why."""


class LexerError(GrammarError):
    """The lexer has failed that a matcher shares with all its copies: it is full, and none of them goes on."""


def tokenizer_of(vocabulary: Vocabulary, size: int) -> LLTokenizer:
    """The tokens of a model with `size` ids; those that have no text are in no language. Takes some 10 us an id.

    Raises GrammarError where there is no id to end with.
    """
    eos = [id for id in vocabulary.eos if id < size]
    if not eos:
        raise GrammarError("this model has no end-of-sequence token, which would end the output")
    return LLTokenizer(_Pieces(vocabulary, size, eos[0]), eos_token=eos)


def matcher_of(grammar: Grammar, tokenizer: LLTokenizer, text: str = "") -> LLMatcher:
    """A matcher before the first token, with the mask of that token computed, which may take longest. `text` is the
    grammar in Lark's syntax, where that is known.

    Lets the GIL go. Raises GrammarError.
    """
    text = text or lark(grammar)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        if "NoExtension" in str(matcher.stop_reason()) + matcher.get_error()[:20]:
            raise GrammarError("there is no text that follows it")
        raise GrammarError(_reason(matcher.get_error(), grammar, text)[:1000] or str(matcher.stop_reason()))
    return matcher


def _reason(error: str, grammar: Grammar, text: str) -> str:
    """What is wrong with a grammar, of all that llguidance says: it shows the lines of `text`, which are ours. Lines
    of the client's own are numbered."""
    first, *_ = LISTING.split(error.partition("\n<state>")[0], maxsplit=1)
    place = POSITION.match(first)
    reason = REGEX_ERROR.sub("", first[place.end() if place else 0 :]).strip()
    if grammar.kind == "regex":
        return reason.rpartition(": ")[2]
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    own = grammar.source.split("\n") if grammar.kind == "ebnf" else []
    return f"line {own.index(line) + 1}: {reason}" if line in own else reason


def check(matcher: LLMatcher) -> None:
    """Raises GrammarError where the matcher has failed: it tells nobody itself."""
    if matcher.is_error():
        error = re.split(r"\n<(?:state|non-verbose)", matcher.get_error())[0].strip()[:1000]
        raise (LexerError if error.startswith("lexer error") else GrammarError)(error or str(matcher.stop_reason()))


def lark(grammar: Grammar) -> str:
    """The grammar in Lark's syntax. Raises GrammarError where it cannot be read."""
    answer = _answer(grammar)
    return HEAD + (answer if grammar.thoughts is None else _behind(grammar.thoughts, answer))


def plain(grammar: Grammar) -> Grammar:
    """The grammar in a form that takes no time to read: schemas and llama.cpp's syntax are read by Python, which holds
    up all other threads. Raises GrammarError."""
    if grammar.kind == "regex":
        return grammar
    return msgspec.structs.replace(grammar, kind="lark", source=_answer(grammar))


def _answer(grammar: Grammar) -> str:
    match grammar.kind:
        case "lark":
            return grammar.source
        case "regex":
            return f"start: /(?:{regex_to_lark(grammar.source, 'dw')})/\n"
        case "json":
            return _followed(f"start: %json {_schema(grammar.source)}\n")
        case "ebnf":
            return _followed(OPTIONS.sub("", _from_ebnf(grammar.source)))
        case "calls":
            return _followed(grammar.source)


def _behind(thoughts: Thoughts, answer: str) -> str:
    """Thoughts, and then a grammar as it is. A lazy tag wins over an answer that could begin with the same text."""
    open, close = _literal(thoughts.open), _literal(thoughts.close)
    rules = (
        f"start: {'thought space' if thoughts.opened else '(open thought space)?'} answer",
        f"open: {open}" if thoughts.open.special else f"open[lazy]: {open}",
        f"thought: TEXT {close}" if thoughts.close.special else f"thought[suffix={close}]: TEXT",
        "TEXT: /(?s:.*)/",
        r"space: /[ \n]{0,8}/",
        f"answer: %lark {{\n{answer}\n}}",
    )
    return "\n".join(rules)


def _literal(tag: Tag) -> str:
    return f"<[{tag.ids[0]}]>" if tag.special else json.dumps(tag.text)


def _from_ebnf(source: str) -> str:
    if IS_LARK.search(source):
        return source
    source = NUMBERED.sub(_character, source)
    try:
        return gbnf_to_lark(source)
    except Exception as error:  # it raises plain Exceptions, and RecursionErrors
        raise GrammarError(f"it cannot be read: {error}") from error


def _character(found: re.Match[str]) -> str:
    """The character itself: llguidance's translation loses zeros of its number. ASCII, which may mean something here,
    keeps a number."""
    number = int(found[1] or found[2] or "5c", 16)
    if found[0] == r"\\":
        return found[0]
    if number > sys.maxunicode or 0xD800 <= number < 0xE000:
        raise GrammarError(f"it cannot be read: {found[0]} is no character")
    return chr(number) if number >= 0x80 else f"\\x{number:02x}"


def _schema(source: str) -> str:
    """A schema as an object, which is what %json takes."""
    try:
        schema: Any = msgspec.json.decode(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise GrammarError("a schema must be an object or a boolean")
    return source if isinstance(schema, dict) else "{}" if schema else '{"enum": []}'


def _followed(text: str) -> str:
    """Every schema in a grammar as llguidance follows it, and without options of its own for it, which could make it
    lenient."""
    parts, at = [], 0
    for found in SCHEMA.finditer(text):
        if found.end() < at:  # within a schema
            continue
        try:
            schema, end = JSON.raw_decode(text, found.end())
            schema = followed(schema) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        except SchemaError as error:
            raise GrammarError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from error
        parts += [text[at : found.end()], json.dumps(schema)]
        at = end
    return "".join((*parts, text[at:]))


class _Pieces(TokenizerWrapper):
    """A tokenizer as llguidance wants to see one."""

    def __init__(self, vocabulary: Vocabulary, size: int, eos: int) -> None:
        self.eos_token_id, self.bos_token_id = eos, None
        self.tokens = [*vocabulary.pieces[:size], *[b""] * (size - len(vocabulary.pieces))]
        self.special_token_ids = sorted({id for id in vocabulary.special if id < size} | {eos})
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("texts are forced by nobody: see HEAD")
