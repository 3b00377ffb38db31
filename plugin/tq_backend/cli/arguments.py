"""Types of command line arguments that several commands share: a value, or a sentence why it is none."""

from __future__ import annotations

import argparse
import re

from tq_backend._library import native
from tq_backend.model_text import MOST_TOKENS, shown


def parse_positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,9}", text, re.ASCII) or int(text) > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to {MOST_TOKENS}")
    return int(text)


def parse_format(text: str) -> str:
    """A format that an engine can be given."""
    names = [row["name"] for row in native().formats() if not row["test_only"]]
    if text not in names:
        raise argparse.ArgumentTypeError(f"there is no KV format {shown(text)}; it must be one of {', '.join(names)}")
    return text
