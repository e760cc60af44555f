"""`certdraft completion`: completion of commands and options for bash, zsh and fish.

The options are read from every command's own help, so the script knows exactly what the parser knows; a
script costs no start of Python at each press of Tab.
"""

from __future__ import annotations

import re
import sys
from typing import Literal

_OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.]*")

_BASH = """\
# bash completion of certdraft: source this file, or put it into
# ~/.local/share/bash-completion/completions/certdraft
_certdraft() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options=
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _certdraft certdraft
"""
_ZSH = """\
#compdef certdraft
# zsh completion of certdraft: put this file, named _certdraft, into a folder of $fpath
_certdraft() {{
    local -a commands options
    commands=({described})
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $words[2] in
{cases}
    esac
    if [[ $PREFIX == -* ]]; then compadd -a options; else _files; fi
}}
_certdraft "$@"
"""


def completion(shell: Literal["bash", "zsh", "fish"] = "bash") -> None:
    """Print a completion script; takes some seconds, because every command is asked for its options.

    bash: `certdraft completion --shell bash > ~/.local/share/bash-completion/completions/certdraft`

    Args:
        shell: which shell to write for.
    """
    from certdraft.train.commands.cli import COMMANDS

    options = {}
    for name in COMMANDS:
        print(f"asking certdraft {name}", file=sys.stderr)
        options[name] = options_of(name)
    print(script(shell, options, {name: command.summary for name, command in COMMANDS.items()}))


def options_of(command: str) -> list[str]:
    """Every option that a command's help shows, in its order."""
    from certdraft.train.commands.cli import captured

    return list(dict.fromkeys(_OPTION.findall(captured([command, "--help"])[1])))


def script(shell: str, options: dict[str, list[str]], summaries: dict[str, str]) -> str:
    """The completion script.

    Args:
        shell: "bash", "zsh" or "fish".
        options: command → its options.
        summaries: command → one line of help.
    """
    if shell == "fish":
        lines = ["# fish completion of certdraft: ~/.config/fish/completions/certdraft.fish"]
        for name, found in options.items():
            about = summaries[name].replace("'", "\\'")
            lines.append(f"complete -c certdraft -n __fish_use_subcommand -f -a {name} -d '{about}'")
            seen = f"__fish_seen_subcommand_from {name}"
            lines += [f"complete -c certdraft -n '{seen}' -l {option[2:]} -r" for option in found]
        return "\n".join(lines)
    if shell == "bash":
        cases = "\n".join(
            f'        {name}) options="{" ".join(found)}" ;;' for name, found in options.items()
        )
        return _BASH.format(commands=" ".join(options), cases=cases)
    cases = "\n".join(f"        {name}) options=({' '.join(found)}) ;;" for name, found in options.items())
    described = " ".join("'{}:{}'".format(n, summaries[n].replace("'", "")) for n in options)
    return _ZSH.format(described=described, cases=cases)
