"""No kernel body that is shared between GPUs may assume how many lanes a warp has: waves have 32 or 64.

check_lanes.py [ROOT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# The bodies, and the host code that sizes their grids. Targets (arch/) know their own wave.
SOURCES = ("csrc/kernels/gpu/*", "hip/*.cc")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# Each with what to write instead.
IDIOMS = (
    (re.compile(r"(?<!>> )(?<!\w)32(?!\w)(?!['\"])"), "the number 32: use kWave"),
    (re.compile(r"(?<![\w.])(?:&|%)\s*(?:31|0x1f)(?!\w)", re.I), "a lane mask of 31: use kWave"),
    (re.compile(r"(?:>>|<<)\s*5(?!\w)"), "a shift by 5: use kWave"),
    (re.compile(r"0xffffffff(?:u|ull?)?(?!\w)", re.I), "a mask of 32 lanes: use the target's shuffles"),
    (re.compile(r"__\w+_sync\s*\("), "a CUDA operation with a lane mask: use the target's"),
    (re.compile(r"\bwarpSize\b|__activemask|__ballot|__popc\b|__ffs\b"), "a lane mask: use the target's functions"),
)


def check(root: Path) -> list[str]:
    problems = []
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    for path in files:
        code = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), path.read_text())
        for number, line in enumerate(code.splitlines(), 1):
            problems += [
                f"{path.relative_to(root)}:{number}: {what}: {line.strip()}"
                for idiom, what in IDIOMS
                if idiom.search(line)
            ]
    return problems


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems = check(root)
    print("\n".join(problems) if problems else "lanes: no body assumes 32")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
