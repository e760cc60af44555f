"""`python -m certdraft`: the same program as the `certdraft` and `lightning` scripts."""

from certdraft.train.cli import main

main()
