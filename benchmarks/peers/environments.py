"""Build the peers' environments: `make peers-env`, or `python benchmarks/peers/environments.py [NAME...]`.

    build/peers/env/NAME       a virtual environment each, from requirements/NAME.txt
    build/peers/llama.cpp      source (from the llama-cpp-python source package) and bin

A requirements file is a full, tested freeze, installed with --no-deps. Some tools declare a torch that would bring
gigabytes of CUDA, but run on the CPU build that all share. Packages that are compiled against the installed torch, or
whose declarations contradict what works, come last. onecard and its tests need nothing of this.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LLAMA = "llama-cpp-python==0.3.36"
TARGETS = ("llama-quantize", "llama-imatrix")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DGGML_OPENMP=OFF",
)
# Built from source, against the packages of the requirements file.
AFTERWARDS = {"gptqmodel": ["gptqmodel==7.7.0"]}
SWITCHES = {"BUILD_CUDA_EXT": "0"}


def run(*command: str | Path, **env: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env=os.environ | env)


def environment(name: str, build: Path) -> None:
    folder = build / "env" / name
    stamp, wanted = folder / ".installed", (HERE / "requirements" / f"{name}.txt").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--no-deps"]
    run(*pip, "-r", HERE / "requirements" / f"{name}.txt")
    if name in AFTERWARDS:
        run(*pip, "--no-build-isolation", *AFTERWARDS[name], **SWITCHES)
    stamp.write_text(wanted)


def llama_cpp(build: Path) -> None:
    home = build / "llama.cpp"
    if all((home / "bin" / target).exists() for target in TARGETS):
        return
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    # Without --no-deps pip would fetch the build requirements of the Python package.
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", home, LLAMA)
    with tarfile.open(next(home.glob("*.tar.gz"))) as archive:
        archive.extractall(home, filter="data")
    vendor = next(home.glob("llama_cpp_python-*")) / "vendor" / "llama.cpp"
    (home / "source").symlink_to(vendor.relative_to(home))
    run("cmake", "-S", vendor, "-B", home / "build", *OPTIONS)
    run("cmake", "--build", home / "build", "--target", *TARGETS, "-j", "2")
    (home / "bin").symlink_to("build/bin")


def main() -> int:
    known = sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"only these: {', '.join(known)}")
    parser.add_argument("--build", type=Path, default=HERE.parent.parent / "build" / "peers")
    given = parser.parse_args()
    build = given.build.resolve()
    failed = []
    for name in given.name or known:
        try:
            environment(name, build)
            if name == "llamacpp":
                llama_cpp(build)
        except subprocess.CalledProcessError as error:  # the rows of that peer will say that its environment is missing
            print(f"{name} cannot be built: {error}", file=sys.stderr)
            failed.append(name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
