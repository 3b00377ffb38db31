"""A library of the package that is cut short, as by a full disk: a sentence, where the dynamic linker would end the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tq_backend

PACKAGE = Path(tq_backend.__file__).parent
NAMES = sorted(p.name for p in PACKAGE.glob("*.so*") if not p.name.startswith("libtq_kernels_"))
OPEN = "from tq_backend._library import native, torch_ops; native(); torch_ops()"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "tq_backend"
    shutil.copytree(PACKAGE, folder)
    return folder


def opened(copy: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}
    return subprocess.run([sys.executable, "-c", OPEN], env=environment, capture_output=True, text=True, check=False)


def test_the_copy_opens(copy):
    assert {"libtq_backend.so", "libtq_torch.so"} < set(NAMES) and any(name.startswith("_native") for name in NAMES)
    done = opened(copy)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kept", [0, 1000, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_cut_short_is_named(copy, name, kept):
    library = copy / name
    whole = library.read_bytes()
    library.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    try:
        done = opened(copy)
    finally:
        library.write_bytes(whole)
    assert done.returncode == 1, f"{done.returncode} {done.stderr}"
    assert f"{library} is cut short; reinstall it with" in done.stderr
