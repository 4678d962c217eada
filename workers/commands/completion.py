"""`towers completion`: what a shell completes commands and options by, out of their parsers."""

from __future__ import annotations

import argparse
from typing import Any

from workers.commands import command, show

BASH = """_towers() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} words=
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        *) case "$COMP_CWORD ${{COMP_WORDS[1]}} $cur" in
            1\\ *) words="{commands}" ;;
{options}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _towers towers
"""

ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add(commands: Any) -> None:
    completion = command(
        commands,
        "completion",
        "print what a shell needs to complete this program's commands",
        'eval "$(towers completion bash)"',
        _completion,
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="Of this shell.")


def _completion(args: argparse.Namespace) -> int:
    from workers.cli import parser

    script = bash(parser())
    script = ZSH + script if args.shell == "zsh" else script
    print(script, end="")
    return show(args, "", {"shell": args.shell, "script": script})


def bash(parser: argparse.ArgumentParser) -> str:
    """A script for bash; where nothing of ours fits, it completes files."""
    values, options = [], []
    commands: dict[str, argparse.ArgumentParser] = next(
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, sub in commands.items():
        flags = [flag for flag in sub._option_string_actions if flag.startswith("--")]
        options.append(f'            *\\ {name}\\ -*) words="{" ".join(flags)}" ;;')
        for action in sub._actions:
            known = " ".join(map(str, action.choices or ())) or _allowed(action)
            for flag in action.option_strings:
                if known:
                    values.append(f'        "{name} {flag}") words="{known}" ;;')
    lines = {"values": "\n".join(values), "options": "\n".join(options)}
    return BASH.format(commands=" ".join(commands), **lines)


def _allowed(action: argparse.Action) -> str:
    """The values that an option of the configuration may have, as its help shows them."""
    shown = action.metavar if isinstance(action.metavar, str) else ""
    return shown.replace("|", " ") if "|" in shown else ""
