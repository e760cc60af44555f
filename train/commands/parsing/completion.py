"""`certdraft completion`: completion of commands and options for the shells that shtab writes for.

The options are those of every command's own help, so a press of Tab starts no Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

_OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.]*")


def completion(shell: Literal["bash", "zsh", "fish", "tcsh"] = "bash") -> None:
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

    return list(dict.fromkeys(_OPTION.findall(captured([command, "--help=all"])[1])))


def script(shell: str, options: Mapping[str, Sequence[str]], summaries: Mapping[str, str]) -> str:
    """The completion script."""
    import shtab

    parser = argparse.ArgumentParser("certdraft")
    commands = parser.add_subparsers()
    for name, found in options.items():
        command = commands.add_parser(name, help=summaries[name].replace("%", "%%"), add_help=False)
        for option in found:
            command.add_argument(option).complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)
