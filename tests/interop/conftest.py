"""Fixtures of the interop suite: one workspace, one run of each engine over everything it is asked about."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs engines; `make interop` runs it, `make test` does not."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session")
def workspaces() -> Callable[[int], Any]:
    """Target, drafters and exports, by the target's layers."""
    from interop.cases import Workspace
    from interop.environments import ENVIRONMENTS

    @functools.cache
    def of(layers: int) -> Workspace:
        return Workspace(ENVIRONMENTS / "work" / f"{layers}-layers", layers)

    return of


@pytest.fixture(scope="session")
def workspace(workspaces: Callable[[int], Any]) -> Any:
    """That of the embedded target."""
    return workspaces(8)


@pytest.fixture(scope="session")
def engine() -> Callable[..., dict[str, Any]]:
    """Runs jobs in an engine, or skips where it is not installed."""
    from interop.engines_run import run
    from interop.environments import ready

    def answers(
        name: str, jobs: list[dict[str, Any]], *options: str, script: str | None = None
    ) -> dict[str, Any]:
        if not ready(name):
            pytest.skip(f"{name} is not installed; run `make interop`, which says why it could not be")
        return run(name, jobs, *options, script=script)

    return answers


@pytest.fixture(scope="session")
def log() -> Iterator[list[dict[str, Any]]]:
    """What was compared, written to $CERTDRAFT_INTEROP_LOG at the end."""
    rows: list[dict[str, Any]] = []
    yield rows
    if rows and (path := os.environ.get("CERTDRAFT_INTEROP_LOG")):
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
