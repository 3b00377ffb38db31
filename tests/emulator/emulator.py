"""Runs launches of one code object in tinygrad's emulator of AMD instructions (test/mockgpu/amd/emu.py of its repository).

Environment: TQ_EMULATOR_TARGET, like gfx1100; TQ_EMULATOR_CODE, the code object. runtime.cc imports this module.
What the launch of a real runtime does besides: the kernel descriptor's user registers, the hidden arguments, the dispatch packet.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from pathlib import Path

from test.mockgpu.amd import emu

ARCHITECTURES = {"gfx11": "rdna3", "gfx12": "rdna4", "gfx94": "cdna", "gfx95": "cdna"}
LOADED, DYNAMIC_SYMBOLS = 1, 11  # PT_LOAD, SHT_DYNSYM
GRANULE = 512  # bytes of LDS, in which a descriptor counts
NOP = b"\x00\x00\x80\xbf"

target = os.environ["TQ_EMULATOR_TARGET"]
code = Path(os.environ["TQ_EMULATOR_CODE"])


def printed_by(*command: str) -> list[str]:
    return subprocess.run([*command, str(code)], capture_output=True, text=True, check=True).stdout.splitlines()


class Image:
    """The code object as it would lie in memory. It needs no relocations: llvm-readobj -r shows none."""

    def __init__(self, elf: bytes) -> None:
        programs, sections = struct.unpack_from("<QQ", elf, 32)
        program_size, num_programs, section_size, num_sections = struct.unpack_from("<HHHH", elf, 54)
        headers = [struct.unpack_from("<IIQQQQQQ", elf, programs + i * program_size) for i in range(num_programs)]
        loads = [
            (h[2], h[3], h[5], h[6]) for h in headers if h[0] == LOADED
        ]  # offset, address, bytes in file, in memory
        self._memory = ctypes.create_string_buffer(max(address + size for _, address, _, size in loads) + 8192)
        self.base = (ctypes.addressof(self._memory) + 4095) // 4096 * 4096
        for offset, address, size, _ in loads:
            ctypes.memmove(self.base + address, elf[offset : offset + size], size)
        tables = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + i * section_size) for i in range(num_sections)]
        self.symbols = {}
        for table in (t for t in tables if t[1] == DYNAMIC_SYMBOLS):
            names = tables[table[6]][4]
            for at in range(table[4], table[4] + table[5], 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
                self.symbols[elf[names + name : elf.index(b"\0", names + name)].decode()] = value
        # Cache control, which means nothing here and has no format in the emulator.
        for line in printed_by("llvm-objdump-22", "-d"):
            found = re.match(r"\s+(?:buffer_(?:gl|inv|wb)|global_(?:inv|wb))\w*.*// ([0-9A-F]+): ([0-9A-F ]+)", line)
            if found:
                words = len(found[2].split())
                ctypes.memmove(self.base + int(found[1], 16), NOP * words, 4 * words)


def hidden_arguments() -> dict[str, dict[str, int]]:
    """Offsets of each kernel's hidden arguments, from the code object's metadata."""
    found, arguments, offset = {}, {}, 0
    for line in printed_by("llvm-readobj-22", "--notes"):
        key, _, value = line.strip().removeprefix("- ").partition(":")
        if key == ".offset":
            offset = int(value)
        elif key == ".value_kind":
            arguments[value.strip()] = offset
        elif key == ".name":
            found[value.strip()] = {kind: at for kind, at in arguments.items() if kind.startswith("hidden_")}
            arguments = {}
    return found


image = Image(code.read_bytes())
hidden = hidden_arguments()
names: list[str] = []


def function(name: str) -> int:
    """A handle, or 0."""
    if f"{name}.kd" not in image.symbols:
        return 0
    names.append(name)
    return len(names)


def address_of(name: str) -> int:
    return image.base + image.symbols[name] if name in image.symbols else 0


def launch(handle: int, gx: int, gy: int, gz: int, threads: int, arguments: int) -> None:
    """The one argument of our kernels is a struct at `arguments`. The descriptor's fields: AMDGPU usage, LLVM's documentation."""
    name = names[handle - 1]
    descriptor = image.base + image.symbols[f"{name}.kd"]
    fields = ctypes.string_at(descriptor, 64)
    lds, scratch, size = struct.unpack_from("<III", fields, 0)
    (entry,) = struct.unpack_from("<q", fields, 16)
    (rsrc2,) = struct.unpack_from("<I", fields, 52)
    properties, preload = struct.unpack_from("<HH", fields, 56)
    if preload:
        raise NotImplementedError(f"{name} wants {preload} preloaded arguments")
    memory = ctypes.create_string_buffer(size + 64)
    kernarg = (ctypes.addressof(memory) + 63) // 64 * 64
    at = hidden[name]
    ctypes.memmove(kernarg, arguments, min(at.values(), default=size))
    values = {"block_count_x": gx, "block_count_y": gy, "block_count_z": gz}
    values |= {"group_size_x": threads, "group_size_y": 1, "group_size_z": 1}
    for kind, value in values.items():
        if f"hidden_{kind}" in at:
            packed = struct.pack("<H" if kind.startswith("group") else "<I", value)
            ctypes.memmove(kernarg + at[f"hidden_{kind}"], packed, len(packed))
    packet = ctypes.create_string_buffer(
        struct.pack("<6H5I2Q", 0, 3, threads, 1, 1, 0, gx * threads, gy, gz, scratch, lds, descriptor, kernarg), 64
    )
    user = []
    for bit, pointer in ((1, 0), (2, ctypes.addressof(packet)), (4, 0), (8, kernarg)):
        if properties & bit:
            user += [0] * 4 if bit == 1 else [pointer & 0xFFFFFFFF, pointer >> 32]
    rsrc2 |= -(-lds // GRANULE) << 15
    architecture = ARCHITECTURES[target[:5]]
    emu.run_asm(descriptor + entry, 0, gx, gy, gz, threads, 1, 1, kernarg, rsrc2, scratch, architecture, user)
