"""Long names and paths in errors: Python gets the library's own sentence, and never a UnicodeDecodeError instead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tq_backend._library import native

CHARACTERS = ["x", "é", "€", "🚀"]  # 1 to 4 bytes in UTF-8


@pytest.mark.parametrize("character", CHARACTERS)
@pytest.mark.parametrize("before", range(4))
def test_a_long_name_is_cut_between_characters(character: str, before: int):
    with pytest.raises(ValueError, match="there is no KV format '") as raised:
        native().format_by_name("-" * before + character * 600)
    assert type(raised.value) is ValueError  # UnicodeDecodeError is one too
    assert str(raised.value).endswith(character + "…")


@pytest.mark.parametrize("before", range(2))
def test_a_long_folder_is_cut_after_a_folder(before: int):
    for row in native().libraries("/" * before + "/λέξη" * 60):
        assert row["path"].endswith("/λέξη/…")
        assert row["reason"].endswith("/λέξη/…")


def test_a_folder_whose_name_is_not_utf8():
    code = "from tq_backend._library import native; print(ascii([row['reason'] for row in native().libraries()]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TQ_KERNELS_DIR": os.fsdecode(b"/no\xffwhere")},
    )
    assert done.returncode == 0, done.stderr
    assert "there is no /no?where/libtq_kernels_cpu.so" in done.stdout
