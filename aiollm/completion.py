"""Scripts by which bash, zsh and fish complete the command line, written from the settings themselves.

To try one: source <(aiollm completion bash).
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from aiollm.arguments import COMMANDS
from aiollm.chat import OPTIONS
from aiollm.config import FIELDS

FILES = ("FILE", "MODEL")  # units of values that are paths


class Flag(NamedTuple):
    names: Sequence[str]
    """Without the dashes in front."""
    unit: str
    """Placeholder of the value, "" where there is none."""
    text: str
    values: Sequence[str] = ()
    """The only ones possible, if they can be listed."""


def flags() -> list[Flag]:
    """What a server takes."""
    others = [
        Flag(["help"], "", "show every flag"),
        Flag(["version"], "", "show the version"),
        Flag(["config"], "FILE", "YAML file of settings"),
        Flag(["print_config"], "", "print the settings as such a file"),
    ]
    return others + [
        Flag([field.name, *field.setting.aliases], field.setting.unit, field.setting.text, _values(field.plain))
        for field in FIELDS.values()
    ]


def chat_flags() -> list[Flag]:
    return [Flag([name], unit, text) for name, (unit, text) in OPTIONS.items()]


def main(argv: Sequence[str]) -> int:
    """Print the script for one shell."""
    if argv in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        print(USAGE, file=sys.stderr)
        return 2
    print(SHELLS[argv[0]](), end="")
    return 0


def bash() -> str:
    every = flags()
    cases = [
        f"    {_dashed(flag, '|')}) {_bash_values(flag)} return ;;" for flag in [*every, *chat_flags()] if flag.unit
    ]
    return f"""\
_aiollm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} flags
    COMPREPLY=()
    case $before in
{chr(10).join(cases)}
    esac
    if [[ $COMP_CWORD == 1 && $word != -* ]]; then
        COMPREPLY=($(compgen -W '{" ".join(COMMANDS)}' -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
    completion) COMPREPLY=($(compgen -W '{" ".join(SHELLS)}' -- "$word")); return ;;
    chat) flags='{" ".join(_dashed(flag) for flag in chat_flags())}' ;;
    bench|key|models|trace|tune) flags='--help' ;;
    *) flags='{" ".join(_dashed(flag) for flag in every)}' ;;
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    elif [[ ${{COMP_WORDS[1]}} != chat ]]; then
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _aiollm aiollm
"""


def zsh() -> str:
    commands = "\n".join(f"        {_quoted(f'{name}:{text}')}" for name, (_, text) in COMMANDS.items())
    return f"""\
#compdef aiollm
_aiollm() {{
    local -a commands=(
{commands}
    )
    if (( CURRENT == 2 )) && [[ $words[2] != -* ]]; then
        _describe command commands
        return
    fi
    case $words[2] in
    completion) _values shell {" ".join(SHELLS)} ;;
    chat) _arguments '1:command:' \\
{_zsh_arguments(chat_flags())} ;;
    bench|key|models|trace|tune) _arguments '1:command:' '--help[show every flag]' ;;
    *) _arguments '1:command:' '*:file:_files' \\
{_zsh_arguments(flags())} ;;
    esac
}}
if [[ $funcstack[1] == _aiollm ]]; then _aiollm "$@"; else compdef _aiollm aiollm; fi
"""


def fish() -> str:
    lines = ["complete -c aiollm -f"]
    for name, (_, text) in COMMANDS.items():
        lines.append(f"complete -c aiollm -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
    seen = "__fish_seen_subcommand_from"
    lines.append(f"complete -c aiollm -n '{seen} serve doctor batch' -F")
    lines.append(f"complete -c aiollm -n '{seen} completion' -a '{' '.join(SHELLS)}'")
    for condition, group in (
        (f"not {seen} bench chat completion key models trace tune", flags()),
        (f"{seen} chat", chat_flags()),
    ):
        for flag in group:
            value = f" -x -a '{' '.join(flag.values)}'" if flag.values else " -x" if flag.unit else ""
            value = " -r -F" if flag.unit in FILES else value
            names = " ".join(f"-l {name}" for name in flag.names)
            lines.append(f"complete -c aiollm -n '{condition}' {names}{value} -d {_quoted(flag.text)}")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
USAGE = f"usage: aiollm completion {'|'.join(SHELLS)}; to try one: source <(aiollm completion bash)"


def _values(plain: Any) -> Sequence[str]:
    return get_args(plain) if get_origin(plain) is Literal else ()


def _dashed(flag: Flag, between: str = " ") -> str:
    return between.join(f"--{name}" for name in flag.names)


def _bash_values(flag: Flag) -> str:
    if flag.values:
        return f"""COMPREPLY=($(compgen -W '{" ".join(flag.values)}' -- "$word"));"""
    return 'COMPREPLY=($(compgen -f -- "$word"));' if flag.unit in FILES else ""


def _zsh_arguments(group: Sequence[Flag]) -> str:
    """One argument of _arguments a line; brackets and colons mean something there."""
    lines = []
    for flag in group:
        text = flag.text.replace("\\", "\\\\").replace("]", "\\]").replace("[", "\\[").replace(":", "\\:")
        choices = f"({' '.join(flag.values)})" if flag.values else "_files" if flag.unit in FILES else ""
        value = f":{flag.unit}:{choices}" if flag.unit else ""
        lines += [f"        {_quoted(f'--{name}[{text}]{value}')}" for name in flag.names]
    return " \\\n".join(lines)


def _quoted(text: str) -> str:
    """In single quotes, for all three shells."""
    return "'" + text.replace("'", "'\\''") + "'"
