"""tests/bench/results/<what>.json: a list of figures, written by the command that measured them and by nothing else."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Figure:
    figure: str
    value: float
    unit: str
    bar: str = ""  # what it had to reach, in words; empty if nothing
    baseline: str = ""  # what it was measured against, with its value


def machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def command_line() -> str:
    """As a reader would type it from the repository's root."""
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        path = program.resolve()
        words = ["python", path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def write_results(path: Path, figures: Sequence[Any], gpu: str = "", command: str = "") -> None:
    """figures: Figure, or another dataclass of which the file then is a list."""
    common = {
        "machine": ", ".join(filter(None, [gpu, machine()])),
        "date": datetime.date.today().isoformat(),
        "command": command or command_line(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) | common for figure in figures], indent=1) + "\n")
