"""certdraft as a user has it: wheel and sdist built from the sources, the wheel in a fresh environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import certdraft

ROOT = Path(certdraft.__file__).parent
_NOT_SOURCES = {"benchmarks", "build", "dist", "docs", "lightning_logs", "runs", "tests", "wandb"}
_BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
# No key, no hub: port 9 refuses at once. What the user's machine has set up does not reach the commands.
_ENVIRONMENT = {
    "HF_ENDPOINT": "http://127.0.0.1:9", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online",
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "COLUMNS": "120",
}  # fmt: skip
_FOREIGN = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_API_KEY", "CERTDRAFT_DEBUG")


def build(kind: str, folder: Path) -> Path:
    """Build a "wheel" or an "sdist" from a copy of the sources, into `folder`."""
    sources = folder / "sources"
    if not sources.exists():
        shutil.copytree(ROOT, sources, ignore=_unneeded)
    command = [sys.executable, "-c", _BUILD, f"build_{kind}", str(folder)]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def _unneeded(folder: str, names: list[str]) -> set[str]:
    found = {
        name for name in names if name.startswith(".") or name == "__pycache__" or name.endswith(".egg-info")
    }
    return found | (_NOT_SOURCES & set(names) if Path(folder) == ROOT else set())


@dataclass(frozen=True)
class Installed:
    """A fresh environment outside the clone, with certdraft's wheel; its dependencies are those of the tests.

    Attributes:
        bin: folder of its scripts.
        home: working folder and HOME of the commands.
    """

    bin: Path
    home: Path

    @classmethod
    def make(cls, wheel: Path, folder: Path) -> Installed:
        """Make the environment in `folder` and install the wheel with pip."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
        python = folder / "env" / "bin" / "python"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*pip, str(wheel)], check=True)
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        # A path file adds the packages of the tests; their own path files, as of a clone, are not read.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "home").mkdir()
        return cls(folder / "env" / "bin", folder / "home")

    def run(self, *args: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the environment as a user does."""
        own = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
        own |= {**_ENVIRONMENT, "HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}", **env}
        command = [str(self.bin / args[0]), *args[1:]]
        return subprocess.run(
            command, cwd=self.home, env=own, capture_output=True, text=True, timeout=timeout_s
        )
