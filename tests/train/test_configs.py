"""Every YAML that ships is a config the command line accepts, and says what it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import certdraft
from certdraft.train.commands.cli import main

CONFIGS = Path(certdraft.__file__).parent / "configs"
RUNS = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "target").glob("*.yaml")])
LOSSES = sorted((CONFIGS / "loss").glob("*.yaml"))
DRAFTERS = sorted((CONFIGS / "drafter").glob("*.yaml"))
WEIGHTS = sorted((CONFIGS / "step_weights").glob("*.yaml"))


def resolved(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *args, "--print_config"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_run_configs_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "--config", str(path))
    assert config["trainer"]["max_steps"] > 0
    assert config["seed_everything"] is not None


@pytest.mark.parametrize("path", [*LOSSES, *DRAFTERS, *WEIGHTS], ids=lambda p: str(p.relative_to(CONFIGS)))
def test_group_files_compose(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = path.parent.name
    config = resolved(capsys, "--config", str(CONFIGS / "demo.yaml"), f"--model.{key}", str(path))
    own = yaml.safe_load(path.read_text())
    assert config["model"]["init_args"][key]["class_path"].endswith("." + own["class_path"])


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_losses_instantiate(path: Path) -> None:
    from jsonargparse import ArgumentParser

    from certdraft.losses import Loss

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Loss, "loss")
    loss = parser.instantiate(parser.parse_object({"loss": yaml.safe_load(path.read_text())})).loss
    assert isinstance(loss, Loss)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_opens_with_purpose_hardware_and_time(path: Path) -> None:
    comment = "".join(re.findall(r"^#.*\n", path.read_text().split("\n\n")[0], flags=re.M))
    assert re.search(r"Hardware", comment), path
    assert re.search(r"[Tt]ime|hour|minute", comment), path
