"""`python -m certdraft`: the same program as the `certdraft` and `lightning` scripts."""

from certdraft.train.commands.cli import main

main()
