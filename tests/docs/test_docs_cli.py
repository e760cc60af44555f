"""The page on the command line knows every command."""

from pathlib import Path

import certdraft
from certdraft.train.commands.cli import COMMANDS


def test_every_command_has_its_row() -> None:
    page = (Path(certdraft.__file__).parent / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in COMMANDS if f"`{name}`" not in rows] == []
