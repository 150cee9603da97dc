"""The file of API keys: a mapping from names to digests and limits, so that whoever reads it has no key.

    alice: {sha256: 5d1c...}
    batch:
      sha256: 90ab...
      max_requests: 64
      tokens_per_minute: 200000
      min_priority: 10
      cache_share: 0.3

A fast hash is enough: keys are 256 random bits that nobody guesses, however cheap a guess is. Slow hashes (bcrypt,
scrypt) protect words that people choose, and would cost each request some tenths of a second.
"""

import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import Meta

MOST_KEYS = 1000  # each request is compared with all of them, in 0.2 ms
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "a name is a letter and up to 63 letters, digits, dots, dashes and underscores"
_RULES = {
    "sha256": "64 hexadecimal digits, as `aiollm key NAME` prints",
    "max_requests": "an integer of at least 1",
    "tokens_per_minute": "an integer of at least 1",
    "min_priority": "an integer from -100 to 100",
    "shares_cache": "true or false",
    "cache_share": "a number above 0 and at most 1",
}
_USAGE = """\
usage: aiollm key NAME
draws an API key, shows it this once on stderr, and prints its line for the file that --api_key_file names:
    aiollm key alice >> keys.yaml
"""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file says of one key; None is no limit."""

    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    max_requests: Annotated[int, Meta(ge=1)] | None = None
    """Choices that may run or wait at once."""
    tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    """Of prompts and outputs together."""
    min_priority: Annotated[int, Meta(ge=-100, le=100)] = -100
    """The smallest priority, which is the most urgent one, that its requests can have."""
    shares_cache: bool = False
    """Whether its part of the prefix cache is that of all keys that say so. Else it is alone there: how soon a first
    token comes would tell whether somebody has sent the same prompt."""
    cache_share: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Of the prefix cache that its part may keep while others want room; None is that of all keys."""


def entries(path: str, values: Mapping[str, Any], lines: Mapping[tuple[str, ...], int]) -> dict[str, Entry]:
    """The keys of a file by name, from what YAML found in it. Raises ValueError that names line and field."""
    found: dict[str, Entry] = {}
    owners: dict[str, str] = {}
    for name, value in values.items():

        def at(field: str, name: str = name) -> str:
            return f"{path}, line {lines.get((name, field), lines[name,])}: {name}"

        if not _NAME.fullmatch(name):
            raise ValueError(f"{path}, line {lines[name,]}: {_NAME_RULE}")
        if not isinstance(value, dict):
            raise ValueError(f"{at('')}: must be like {{sha256: ...}}")
        if unknown := [str(field) for field in value if field not in _RULES]:
            raise ValueError(f"{at(unknown[0])}: unknown field {unknown[0]}; there are {', '.join(_RULES)}")
        if "sha256" not in value:
            raise ValueError(f"{at('')}: sha256 is missing")
        try:
            entry = msgspec.convert(value, Entry)
        except msgspec.ValidationError as error:  # its message may show the value: a key that was put there by mistake
            field = next(field for field in _RULES if f"`$.{field}`" in str(error))
            raise ValueError(f"{at(field)}: {field} must be {_RULES[field]}") from None
        if entry.shares_cache and entry.cache_share is not None:
            raise ValueError(f"{at('cache_share')}: cache_share is for keys that do not share the cache")
        if entry.sha256 in owners:
            raise ValueError(f"{at('sha256')}: sha256 is that of {owners[entry.sha256]} too")
        found[name], owners[entry.sha256] = entry, name
    if len(found) > MOST_KEYS:
        raise ValueError(f"{path}: {len(found)} keys, and at most {MOST_KEYS} are taken")
    return found


def main(argv: Sequence[str]) -> int:
    """The command `aiollm key`."""
    if argv in (["--help"], ["-h"]):
        print(_USAGE, end="")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print(_USAGE, end="", file=sys.stderr)
        return 2
    if not _NAME.fullmatch(argv[0]):
        print(f"aiollm: {_NAME_RULE}", file=sys.stderr)
        return 2
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{argv[0]}: {{sha256: {sha256(key.encode()).hexdigest()}}}\n"
    try:
        os.write(1, line.encode())  # without a buffer, which would be tried once more at the end
    except OSError as error:
        print(f"aiollm: there is no key, its line cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(key, file=sys.stderr, flush=True)
    return 0
