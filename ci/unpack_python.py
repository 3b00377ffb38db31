"""Unpacks the Python files of a wheel, without its libraries and data, and gives it a version.

unpack_python.py WHEEL FOLDER VERSION
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path, version: str) -> int:
    """Returns the number of files."""
    name = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        files = [file for file in archive.namelist() if file.endswith(".py")]
        archive.extractall(folder, files)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return len(files)


if __name__ == "__main__":
    wheel, folder, version = sys.argv[1:]
    print(f"{unpack(Path(wheel), Path(folder), version)} Python files of {Path(wheel).name} in {folder}")
