"""`certdraft publish --hub` against a hub on this machine: one commit, with the card; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles.servers.fake_hub import FakeHub, serving

from certdraft.data import load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import CardFacts, CausalDrafter, export
from certdraft.evaluation.report.publish import publish as call


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("embedded")
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 16}
    config = sizes | {"intermediate_size": 16, "num_hidden_layers": 1}
    drafter = CausalDrafter(config, vocab_size=2048).eval()
    card = CardFacts("embedded", 2048, tokenizer_fingerprint(tokenizer), metrics={"tau": 2.5})
    folder = tmp_path_factory.mktemp("export") / "drafter"
    export(drafter, folder, tokenizer=tokenizer, draft_length=4, card=card)
    (folder / "run.yaml").write_text("host: mine\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes").write_text("mine\n")
    return folder


def publish(folder: Path, address: str, home: Path, *options: str, **env: str) -> tuple[int, str]:
    """Run the command as a user does, who is online; its exit code and what it said."""
    online = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    online |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "no_proxy": "127.0.0.1", **env}
    command = [sys.executable, "-m", "certdraft", "publish", str(folder), *options]
    done = subprocess.run(command, env=online, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as found:
        yield found


def test_an_export_becomes_a_private_repository_with_its_card(
    exported: Path, hub: FakeHub, tmp_path: Path
) -> None:
    code, said = publish(exported, hub.address, tmp_path, "--hub", "me/drafter", HF_TOKEN="hf_x")
    assert code == 0, said
    made = hub.repos["me/drafter"]
    assert made.get("private") or made.get("visibility") == "private"
    (commit,) = hub.commits
    names = {path.name for path in exported.iterdir() if path.is_file()} - {"run.yaml"}
    assert set(commit) == names
    assert commit["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    card = commit["README.md"].decode()
    assert "vllm serve embedded --speculative-config" in card
    assert '"model": "me/drafter"' in card
    assert "PATH_OF_THIS_FOLDER" not in card
    assert "PATH_OF_THIS_FOLDER" in (exported / "README.md").read_text(), "the folder itself stays as it is"
    assert f"published {exported} as" in said


def test_a_refused_token(exported: Path, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses = 403
    code, said = publish(exported, hub.address, tmp_path, "--hub", "other/drafter", HF_TOKEN="hf_x")
    assert code == 2
    assert "refuses to write to other/drafter (403)" in said
    assert said.count("\n") == 1
    assert hub.commits == []


def test_without_a_token_or_a_hub(exported: Path, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses = 401
    code, said = publish(exported, hub.address, tmp_path, "--hub", "me/drafter")
    assert code == 2
    assert "hf auth login" in said
    code, said = publish(exported, "http://127.0.0.1:9", tmp_path, "--hub", "me/drafter", HF_TOKEN="hf_x")
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("repo", ["drafter", "a/b/c", "me/my drafter"])
def test_names_that_are_no_repository(exported: Path, repo: str) -> None:
    with pytest.raises(ValueError, match="is no repository of the hub; give USER/NAME"):
        call(str(exported), hub=repo)


def test_a_folder_that_is_no_whole_export(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"drafter\.json: no such file; give a folder that"):
        call(str(tmp_path), hub="me/drafter")
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(ValueError, match=r"is not published: error: .*certdraft lint"):
        call(str(broken), hub="me/drafter")
