"""What both Python suites need."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_chosen_format():
    """The page format that an engine of an earlier test chose is not the next test's."""
    yield
    formats = sys.modules.get("tq_backend.vllm_adapter.formats")
    if formats is not None:
        formats._chosen = None


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """CMake's build folder: TQ_BUILD_DIR, else build/."""
    return Path(os.environ.get("TQ_BUILD_DIR") or ROOT / "build")
