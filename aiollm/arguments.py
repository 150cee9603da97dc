"""From the command line, the environment and a YAML file to a `Config`.

The setting `port` is given as `--port`, as AIOLLM_PORT in the environment, or as `port:` in the YAML file that
`--config` names; the first of these wins. Names may be written with underscores (LightLLM) or dashes (vLLM), and some
have an alias in one of the two.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Container, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import msgspec
from msgspec import Meta

from aiollm import __version__
from aiollm.config import FIELDS, GROUPS, Config, Field
from aiollm.peer_flags import NO_EFFECT, NOT_HERE

PREFIX = "AIOLLM_"
# Command -> its arguments in the usage, and what it does.
COMMANDS = {
    "serve": ("[MODEL] [flags]", "serve a model over HTTP; the default"),
    "batch": ("IN OUT [MODEL] [flags]", "answer the requests of a file in OpenAI's batch format, without a server"),
    "doctor": ("[MODEL] [flags]", "check this machine for a server with these flags"),
    "models": ("", "list the models that can be served"),
    "convert": ("FOLDER [--output FOLDER]", "turn a pickled checkpoint into safetensors"),
    "tune": ("[--model FOLDER]", "find the kernels' fastest launch parameters on this GPU"),
    "bench": ("serve|static [flags]", "put load on a running server; static: one step of a model on this GPU"),
    "chat": ("[--url URL]", "talk to a running server"),
    "trace": ("FILE", "sum up what --trace FILE wrote: gaps between iterations"),
    "key": ("NAME", "draw an API key for the file that --api_key_file names"),
    "completion": ("bash|zsh|fish", "print a script by which the shell completes flags"),
}
OTHER_VARIABLES = {
    "CACHE_DIR": "the folder where downloaded and converted models are kept (~/.cache/aiollm)",
    "TRITON_AUTOTUNE_LEVEL": "what a starting worker tunes: 0 nothing, 1 what is missing, 2 all; 3 ignores tuning",
}
TOKENS = re.compile(r"(\d+)([KMGT])|(\d+(?:\.\d+)?)([kmgt])")  # as vLLM has it: only a decimal unit takes a fraction


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The settings of `aiollm [serve|doctor [MODEL]] [flags]`; `argv` is without the program's name.

    --help, --version and --print_config print and exit with 0. What cannot be understood is named on stderr, and the
    exit code is 2.
    """
    named = argv[:1] in (["serve"], ["doctor"])
    parser = _Parser()
    found, rest = parser.parse_known_args([_with_underscores(word) for word in argv[named:]])
    flags: dict[str, Any] = vars(found)
    path, prints = flags.pop("config", None), flags.pop("print_config", False)
    for name in sorted((NO_EFFECT | NOT_HERE).keys() & flags.keys()):
        try:
            _told("--", name, flags.pop(name))
        except ValueError as error:
            parser.error(str(error))
    for word in argv:
        if word.startswith("-") and _with_underscores(word) in rest:
            parser.error(f"unknown flag {word.partition('=')[0]}{_nearest(word, parser.flags)}")
    if rest and not named:
        hint = _nearest(rest[0], list(COMMANDS)) or f"; `aiollm serve {rest[0]}` serves a model"
        parser.error(f"unexpected argument {rest[0]}{hint}")
    if rest:
        models = [*rest, flags["model_dir"]] if "model_dir" in flags else rest
        if len(models) > 1:
            parser.error(f"more than one model: {', '.join(models)}")
        flags["model_dir"] = rest[0]

    try:
        config = _config(flags, path, environ)
    except ValueError as error:
        parser.error(str(error))
    if prints:
        from aiollm import yaml_file

        shown = {name: FIELDS[name].shown(value) for name, value in msgspec.to_builtins(config).items()}
        print(yaml_file.dump(shown), end="")
        parser.exit()
    return config


def given(settings: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """The settings that a program gives by name, with every spelling that a flag has; the environment fills in others.

    Raises ValueError, which names the setting.
    """
    named = _named(settings, "")
    return Config(**_environment(environ, named), **named)


def _config(flags: Mapping[str, Any], path: str | None, environ: Mapping[str, str]) -> Config:
    """Raises ValueError, which names the setting and where it stands."""
    values = _file(path) if path is not None else {}
    values |= _environment(environ, flags)
    for name, given in flags.items():
        raw = _listed(",".join(given)) if FIELDS[name].several else given
        flag = " or ".join(f"--{spelling}" for spelling in (name, *FIELDS[name].setting.aliases))
        values[name] = _value(FIELDS[name], flag, raw)
    return Config(**values)


def allowed(plain: Any, meta: Meta) -> str:
    """The values of a type within a range, in words: "an integer from 0 to 65535"."""
    if get_origin(plain) is Annotated:
        return allowed(*get_args(plain))
    if get_origin(plain) is Literal:
        *some, last = get_args(plain)
        return f"{', '.join(some)} or {last}"
    if get_origin(plain) is tuple:
        return f"one or more, each {allowed(get_args(plain)[0], Meta())}"
    if meta.description is not None:
        return meta.description
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[plain]
    if meta.ge is not None and meta.le is not None:
        return f"{words} from {meta.ge} to {meta.le}"
    limits = {"above": meta.gt, "of at least": meta.ge, "at most": meta.le}
    stated = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    return f"{words} {stated}".strip()


class _Parser(argparse.ArgumentParser):
    """The flags of `FIELDS`; their values stay text. Errors are one line, not the usage of thirty flags."""

    def __init__(self) -> None:
        variables = "; ".join(f"{PREFIX}{name}: {text}" for name, text in OTHER_VARIABLES.items())
        usages = [f"aiollm {name} {arguments}" for name, (arguments, _) in COMMANDS.items()]
        width = max(map(len, usages))
        texts = [text for _, text in COMMANDS.values()]
        lines = [f"{usage:<{width}}  {text}" for usage, text in zip(usages, texts, strict=True)]
        super().__init__(
            prog="aiollm",
            usage="\n       ".join(lines),
            description="Serves a language model over HTTP.",
            epilog=f"Each flag can also be set in the environment, as {PREFIX}PORT=9000, or in the file that --config "
            f"names; a flag wins over the environment, and that over the file. {variables}. "
            "Dashes and underscores in flags are the same. Numbers of TOKENS may be written as 16k (16,000) or 16K "
            "(16,384).",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        )
        self.add_argument("--version", action="version", version=f"aiollm {__version__}")
        self.add_argument("--config", metavar="FILE", help="YAML file of settings, like port: 9000")
        self.add_argument("--print_config", action="store_true", help="print the settings as such a file, and exit")
        self.flags = ["--help", "--version", "--config", "--print_config"]
        groups = {title: self.add_argument_group(title) for title in GROUPS}
        for field in FIELDS.values():
            options: dict[str, Any] = {"dest": field.name, "metavar": field.setting.unit}
            if field.plain is bool:
                options = {"dest": field.name, "action": "store_const", "const": "true"}
            elif field.several:
                options |= {"action": "extend", "nargs": "+"}
            groups[field.setting.group].add_argument(f"--{field.name}", help=_help(field), **options)
            for alias in field.setting.aliases:
                self.add_argument(_with_underscores(f"--{alias}"), help=argparse.SUPPRESS, **options)
            self.flags += [f"--{spelling}" for spelling in (field.name, *field.setting.aliases)]
        for name, flag in (NO_EFFECT | NOT_HERE).items():
            takes: dict[str, Any] = {"metavar": flag.unit} if flag.unit else {"action": "store_true"}
            takes |= {"nargs": "+"} if flag.several else {}
            self.add_argument(f"--{name}", help=argparse.SUPPRESS, **takes)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"aiollm: {message}\n`aiollm --help` lists the flags\n")


def _help(field: Field) -> str:
    """Text, range, default and aliases."""
    notes = []
    if field.plain not in (str, bool, tuple[str, ...]):
        notes.append(allowed(field.plain, field.meta))
    if field.default not in ("", ()) and field.plain is not bool:
        notes.append(f"default {field.default}")
    notes += [f"also --{alias}" for alias in field.setting.aliases]
    text = f"{field.setting.text} [{'; '.join(notes)}]" if notes else field.setting.text
    return text.replace("%", "%%")


def _value(field: Field, source: str, raw: Any) -> Any:
    """`raw` as the field's type; ValueError names `source`, the value and the range."""
    given = field.shown(" ".join(map(str, raw)) if isinstance(raw, list) else raw)
    try:
        spelt = field.setting.spellings.get(raw, raw) if isinstance(raw, str) else raw
        if field.setting.unit == "TOKENS" and isinstance(spelt, str):
            spelt = _tokens(spelt)
        return msgspec.convert(spelt, field.type, strict=False)
    except msgspec.ValidationError:
        raise ValueError(f"{source}: {given} must be {allowed(field.plain, field.meta)}") from None


def _tokens(text: str) -> str:
    """16k -> 16000, 16K -> 16384; text that has no such unit stays as it is."""
    if (found := TOKENS.fullmatch(text)) is None:
        return text
    binary, unit, decimal, small = found.groups()
    if unit:
        return str(int(binary) << 10 * (1 + "KMGT".index(unit)))
    return str(int(Decimal(decimal) * 1000 ** (1 + "kmgt".index(small))))


def _file(path: str) -> dict[str, Any]:
    """The settings in a YAML file."""
    from aiollm import yaml_file  # 20 ms, of use only here

    try:
        found = yaml_file.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    return _named(found, f"{path}: ")


def _named(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by any of their spellings; None leaves one open. `where` is what messages begin with."""
    names = {spelling: field.name for field in FIELDS.values() for spelling in (field.name, *field.setting.aliases)}
    plain = {spelling.replace("-", "_"): name for spelling, name in names.items()}
    values: dict[str, Any] = {}
    for key, raw in found.items():
        spelling = key.replace("-", "_")
        if spelling in NO_EFFECT or spelling in NOT_HERE:
            _told(where, key, raw)
            continue
        if spelling not in plain:
            raise ValueError(f"{where}unknown setting {key}{_nearest(key, [*names, *plain])}")
        field = FIELDS[plain[spelling]]
        if field.name in values:
            raise ValueError(f"{where}{field.name} stands there under two names, one of them {key}")
        if raw is not None:
            several = field.several and not isinstance(raw, list | tuple)
            values[field.name] = _value(field, f"{where}{key}", [raw] if several else raw)
    return values


def _told(where: str, name: str, raw: Any) -> None:
    """Answer a flag of LightLLM or vLLM that is no setting here. Raises ValueError where it asks for what is not there,
    or has a value that they refuse.

    `where` is what stands before the name.
    """
    spelling = name.replace("-", "_")
    if spelling in NO_EFFECT:
        values = NO_EFFECT[spelling].values
        if values and raw is not None and raw not in values:
            *some, last = values
            raise ValueError(f"{where}{name}: {raw} must be {', '.join(some)} or {last}")
        print(f"aiollm: {where}{name} has no effect: {NO_EFFECT[spelling].reason}", file=sys.stderr)
    elif raw not in (None, False) and str(raw).lower() not in NOT_HERE[spelling].values:
        given = "" if raw is True else f" {' '.join(raw) if isinstance(raw, list) else raw}"
        raise ValueError(f"{where}{name}{given} cannot be had: {NOT_HERE[spelling].reason}")


def _environment(environ: Mapping[str, str], but: Container[str]) -> dict[str, Any]:
    """The settings in the environment, without those that are given elsewhere."""
    values = {}
    for name, text in _variables(environ).items():
        if name not in but:
            raw = _listed(",".join(text.split())) if FIELDS[name].several else text
            values[name] = _value(FIELDS[name], PREFIX + name.upper(), raw)
    return values


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in the environment. A name that means nothing is only warned of: Kubernetes makes its own
    (AIOLLM_SERVICE_HOST) where a service is called aiollm."""
    known = {PREFIX + name.upper(): name for name in FIELDS}
    others = [PREFIX + name for name in OTHER_VARIABLES]
    found = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX) and environ[name]):
        if variable in known:
            found[known[variable]] = environ[variable]
        elif variable not in others:
            hint = _nearest(variable, [*known, *others])
            print(f"aiollm: the variable {variable} is not known{hint}", file=sys.stderr)
    return found


def _listed(text: str) -> list[str]:
    """The values of a setting that takes several; each is one at least."""
    return [value for value in text.split(",") if value] or [""]


def _with_underscores(word: str) -> str:
    """--max-model-len=4 -> --max_model_len=4; a word that is no flag stays as it is."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


def _nearest(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], names, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
