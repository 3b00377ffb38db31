"""Jane Austen's novels out of Debian's package r-cran-janeaustenr, installed or unpacked.

The package keeps them as R's serialized vectors of lines, compressed, in one file. R is not needed to read them.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
INSIDE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
# The header of a string: type CHARSXP (9), with the flag for ASCII or for UTF-8.
STRING = re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09")
SHORTEST_NOVEL = 500  # lines; what else is in the file is shorter


def objects(data: bytes) -> Iterator[bytes]:
    """The file is a run of records: four bytes of length, then a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def lines(body: bytes) -> Iterator[str]:
    at = 0
    while found := STRING.search(body, at):
        (length,) = struct.unpack_from(">i", body, found.end())
        at = found.end() + 4 + length
        yield body[found.end() + 4 : at].decode("utf-8", "replace")


def data_file() -> Path:
    """Raises ValueError where there is none."""
    roots = [Path("/")]
    if folder := os.environ.get("TQ_REAL_MODELS"):
        roots.append(Path(folder) / "debian")  # ci/real_models/fetch.py unpacks the package there
    for root in roots:
        if (root / INSIDE).is_file():
            return root / INSIDE
    raise ValueError(
        f"the text 'prose' is from Debian's package {PACKAGE}, of which there is no {' and no '.join(str(r / INSIDE) for r in roots)}; "
        "install it, or unpack it with ci/real_models/fetch.py and name its folder in TQ_REAL_MODELS"
    )


def novel(title: str) -> str:
    for body in objects(data_file().read_bytes()):
        text = list(lines(body))
        if len(text) > SHORTEST_NOVEL and title.lower() in text[0].lower():
            return "\n".join(text) + "\n"
    raise ValueError(f"{data_file()} has no novel {title!r}")
