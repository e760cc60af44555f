"""Wheel and sdist build, and the wheel works in a fresh environment, outside the clone."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from first_hour.installed import ROOT, Installed, build


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("built"))


def test_the_wheel_holds_one_package_and_all_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"certdraft"}
    for folder in ("certificates", "data", "drafters", "evaluation", "losses", "train"):
        sources = {f"certdraft/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
        assert sources - set(names) == set()
    configs = {f"certdraft/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs - set(names) == set()
    assert {
        "certdraft/py.typed",
        "certdraft/__init__.pyi",
        "certdraft/data/embedded/model.safetensors",
    } <= set(names)


def test_the_sdist_builds_the_same_wheel(tmp_path: Path, wheel: Path) -> None:
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (sources,) = (tmp_path / "unpacked").iterdir()
    sources.rename(tmp_path / "again")
    (tmp_path / "rebuilt").mkdir()
    (tmp_path / "again").rename(tmp_path / "rebuilt" / "sources")
    rebuilt = build("wheel", tmp_path / "rebuilt")
    with zipfile.ZipFile(rebuilt) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_the_installed_wheel_answers(wheel: Path, tmp_path: Path) -> None:
    here = Installed.make(wheel, tmp_path)
    where = here.run("python", "-c", "import certdraft; print(certdraft.__file__)").stdout
    assert where.startswith(str(tmp_path / "env"))
    assert here.run("certdraft", "--version").stdout.strip()
    listed = here.run("certdraft", "configs", "recipes/qwen3-8b").stdout
    assert "recipes/qwen3-8b/eagle3" in listed
    assert here.run("lightning", "--help").returncode == 0
    made = here.run("certdraft", "init", "recipes/qwen3-8b/eagle3")
    assert made.returncode == 0, made.stderr
    assert (here.home / "configs" / "recipes" / "qwen3-8b" / "eagle3.yaml").is_file()
