"""What both Python suites need."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """CMake's build folder: TQ_BUILD_DIR, else build/."""
    return Path(os.environ.get("TQ_BUILD_DIR") or ROOT / "build")
