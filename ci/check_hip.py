"""What the compiler made of the HIP kernels: targets, wave sizes, matrix and permute instructions, spills.

check_hip.py BUNDLE COMPILER TARGET...

Uses the LLVM tools beside the compiler (clang-offload-bundler, llvm-objdump, llvm-readelf).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FORMATS = ("k8v4", "k4v4", "k3v4", "k3v3", "tq8", "tqk5v4", "tq4")
KERNELS = {
    *(f"tq_{kernel}_{f}_{lanes}" for kernel in ("store", "dequant") for f in FORMATS for lanes in (4, 8, 16, 32)),
    *(f"tq_attend_{f}_{dim}" for f in FORMATS for dim in (64, 128, 256, 512)),
    *(f"tq_rotate_{lanes}" for lanes in (4, 8, 16, 32)),
    "tq_merge",
    "tq_merge_rotated",
    "tq_copy_pages",
}
# Instruction -> the kernels that must have it. Codes of a codebook are looked up by byte permutes, and the norm of the
# levels that a preset's store chose is a dot product of bytes.
COMMON = {
    "v_perm_b32": r"tq_(attend|dequant)_|tq_store_(k[34]|tq)",
    "v_dot4_u32_u8": r"tq_store_k[34]",
    "ds_bpermute_b32": r"tq_(store_(k[34]|tq)|attend|merge|rotate)",
}
MATRIX = {"gfx9": r"v_mfma_f32_16x16x16_?f16", "gfx11": r"v_wmma_f32_16x16x16_f16", "gfx12": r"v_wmma_f32_16x16x16_f16"}
# Instances without a spilled register of any kind; no kernel may spill vector registers or use scratch memory. Two codebooks are
# more scalars than the compiler keeps: tq_4 and tq_k5v4 put up to 12 of them into vector registers on the gfx9 targets.
MAIN = re.compile(r"tq_(store|dequant|rotate|merge|copy)|tq_attend_(k[348]v[34]|tq8)_(64|128)")


def tool(compiler: str, name: str) -> str:
    """The tool of the compiler's own version."""
    at = Path(shutil.which(compiler) or compiler)
    suffix = re.search(r"-\d+$", at.name)
    beside = at.resolve().parent
    for candidate in (
        at.parent / (name + (suffix[0] if suffix else "")),
        beside / name,
        beside.parent / "llvm/bin" / name,  # of hipcc
    ):
        if candidate.exists():
            return str(candidate)
    raise SystemExit(f"there is no {name} beside {at}; on Debian: apt-get install {at.name.replace('clang++', 'llvm')}")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def metadata(notes: str) -> dict[str, dict[str, int]]:
    """Kernel -> its numbers, from the code object's notes."""
    kernels = {}
    for block in re.split(r"\n  - \.", notes)[1:]:
        name = re.search(r"^\s*(?:- )?\.?name:\s+(tq_\w+)$", block, re.M)
        if name:
            numbers = re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", block, re.M)
            kernels[name[1]] = {key: int(value) for key, value in numbers}
    return kernels


def instructions(disassembly: str) -> dict[str, str]:
    """Function -> its disassembly."""
    parts = re.split(r"^[0-9a-f]+ <(\w+)>:$", disassembly, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check_target(target: str, kernels: dict[str, dict[str, int]], code: dict[str, str]) -> list[str]:
    problems = [f"{target}: there is no {name}" for name in sorted(KERNELS - set(kernels))]
    family = re.match(r"gfx(9|11|12)", target)[0]
    wave = 64 if family == "gfx9" else 32
    for name, numbers in sorted(kernels.items()):
        if numbers.get("wavefront_size") != wave:
            problems.append(f"{target} {name}: waves of {numbers.get('wavefront_size')} lanes, not {wave}")
        for what in ("vgpr_spill_count", "private_segment_fixed_size"):
            if numbers[what] != 0:
                problems.append(f"{target} {name}: {what} is {numbers[what]}")
        if MAIN.match(name) and numbers["sgpr_spill_count"] != 0:
            problems.append(f"{target} {name}: sgpr_spill_count is {numbers['sgpr_spill_count']}")
        for instruction, pattern in {**COMMON, MATRIX[family]: r"tq_attend_"}.items():
            if re.match(pattern, name) and not re.search(rf"\b{instruction}", code.get(name, "")):
                problems.append(f"{target} {name}: no {instruction}")
    return problems


def report(target: str, kernels: dict[str, dict[str, int]]) -> str:
    attend = [numbers for name, numbers in kernels.items() if name.startswith("tq_attend")]
    spills = {n: k["sgpr_spill_count"] for n, k in sorted(kernels.items()) if k["sgpr_spill_count"] != 0}
    most = max(numbers["vgpr_count"] for numbers in attend)
    shared = max(numbers["group_segment_fixed_size"] for numbers in attend)
    scalar = ", ".join(f"{name} {count}" for name, count in spills.items()) or "none"
    return (
        f"{target}: {len(kernels)} kernels, at most {most} vector registers and {shared} bytes of shared memory; "
        f"scalar registers kept in vector registers: {scalar}"
    )


def main() -> int:
    bundle, compiler, *targets = sys.argv[1:]
    bundler = tool(compiler, "clang-offload-bundler")
    listed = run(bundler, "--list", "--type=o", f"--input={bundle}").split()
    ids = {entry.rsplit("--", 1)[-1]: entry for entry in listed if "amdgcn" in entry}
    problems = [f"the bundle has no {target}, only {', '.join(ids)}" for target in targets if target not in ids]
    for target in targets:
        if target not in ids:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/{target}.o"
            run(bundler, "--unbundle", "--type=o", f"--targets={ids[target]}", f"--input={bundle}", f"--output={path}")
            kernels = metadata(run(tool(compiler, "llvm-readelf"), "--notes", path))
            if not re.search(
                r"OBJECT +GLOBAL .* tq_wave_size$", run(tool(compiler, "llvm-readelf"), "--dyn-syms", path), re.M
            ):
                problems.append(f"{target}: the host cannot find tq_wave_size")
            code = instructions(run(tool(compiler, "llvm-objdump"), "-d", "--no-show-raw-insn", path))
        problems += check_target(target, kernels, code)
        if kernels:
            print(report(target, kernels))
    print("\n".join(problems) if problems else f"HIP kernels: as expected for {', '.join(targets)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
