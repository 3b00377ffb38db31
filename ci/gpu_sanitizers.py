"""Runs the CUDA tests of a build under compute-sanitizer's memcheck and racecheck; exit code 1 if one of them finds something.

    python3 ci/gpu_sanitizers.py [--test build/bin/tq_kernels_cuda_test] [--json tests/bench/results/gpu_sanitizers.json]

For a machine with an NVIDIA GPU; needs nothing but Python there. compute-sanitizer comes from PATH or a CUDA toolkit, else from
PyPI. The tests' library is the one they were built with, or TQ_TEST_CUDA_LIBRARY. Nothing is written unless both tools got
through all tests.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SANITIZER = "nvidia-cuda-sanitizer-api==13.0.85"
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) errors?"),
    # A bulk copy's write is a warning: racecheck does not see that its readers wait for the copy's barrier.
    "racecheck": re.compile(
        r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"
    ),
}
# racecheck ends a process whose streams run kernels side by side (H200, driver 580.159.04, 2026-11-28). It checks the shared
# memory of blocks, which has nothing to do with streams; memcheck runs these tests too.
LEFT_OUT = {"racecheck": "*TwoStreams*"}
FOUND = 88  # compute-sanitizer's exit code for findings, unlike any of the tests'


class Incomplete(Exception):
    """A tool did not get through all tests, so that its count means nothing."""


@dataclass
class Result:
    tool: str
    found: int
    warnings: int
    tests: int
    seconds: float


def sanitizer(folder: Path) -> str:
    for path in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if path is not None and Path(path).is_file():
            return path
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), SANITIZER]
    subprocess.run(pip, check=True)
    tool = folder / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    tool.chmod(0o755)
    return str(tool)


def tests_passed(report: Path) -> int:
    """Of GoogleTest's JSON report. Raises Incomplete if one failed or was skipped, or none ran."""
    tests = [test for suite in json.loads(report.read_text())["testsuites"] for test in suite["testsuite"]]
    for test in tests:
        name = f"{test['classname']}.{test['name']}"
        if test.get("failures"):
            raise Incomplete(f"{name} failed")
        if test["result"] != "COMPLETED":
            raise Incomplete(f"{name} did not run: {test['result'].lower()}")
    if not tests:
        raise Incomplete("there is no test")
    return len(tests)


def run(tool: str, command: str, test: Path, folder: Path, seconds: int, configs: int) -> Result:
    log, report = folder / f"{tool}.log", folder / f"{tool}.json"
    arguments = [command, "--tool", tool, "--error-exitcode", str(FOUND), "--log-file", str(log), str(test.resolve())]
    environment = {**os.environ, "TQ_TEST_CONFIGS": str(configs)}
    began = time.monotonic()
    # In a session of its own, so that the tests end with the tool.
    with subprocess.Popen(
        [*arguments, f"--gtest_output=json:{report}", f"--gtest_filter=-{LEFT_OUT.get(tool, '')}"],
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Incomplete(f"the tests took longer than {seconds} s") from None
    text = log.read_text() if log.is_file() else ""
    summary = SUMMARIES[tool].search(text)
    count = summary.groupdict() if summary is not None else {}
    found, warnings = int(count.get("errors", 0)), int(count.get("warnings", 0))
    if summary is None or found:
        print(text[-8000:], flush=True)
    if summary is None or not report.is_file():
        what = "no summary" if summary is None else "no report of the tests"
        raise Incomplete(f"it ended with exit code {code} and left {what}")
    result = Result(tool, found, warnings, tests_passed(report), time.monotonic() - began)
    if code != 0 and not found and not (warnings and code == FOUND):
        raise Incomplete(f"it ended with exit code {code} and found nothing")
    return result


def build_id(library: Path) -> str:
    """What the kernel library says of itself: the second field of its function table."""

    class Head(ctypes.Structure):
        _fields_ = [("struct_size", ctypes.c_uint32), ("build_id", ctypes.c_char_p)]

    get = ctypes.CDLL(str(library.resolve())).tq_kernels_get_api
    get.restype = ctypes.POINTER(Head)
    return get().contents.build_id.decode()


def machine() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    name, driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().split(", ")
    return f"{name}, driver {driver}"


def version(command: str) -> str:
    text = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"Version ([\d.]+)", text)
    return found[1] if found else "of unknown version"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=Path, default=Path("build/bin/tq_kernels_cuda_test"))
    parser.add_argument(
        "--library", type=Path, default=os.environ.get("TQ_TEST_CUDA_LIBRARY"), help="that the tests open"
    )
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    parser.add_argument("--seconds", type=int, default=270, help="at most, for each tool")
    parser.add_argument("--configs", type=int, default=100, help="random configurations of attention")
    args = parser.parse_args()
    library = Path(args.library or args.test.parent.parent / "lib" / "libtq_kernels_cuda.so")
    os.environ["TQ_TEST_CUDA_LIBRARY"] = str(library.resolve())

    results = []
    with tempfile.TemporaryDirectory() as folder:
        command = sanitizer(Path(folder) / "tool")
        for tool in SUMMARIES:
            try:
                results.append(run(tool, command, args.test, Path(folder), args.seconds, args.configs))
            except Incomplete as reason:
                print(f"{tool} is not complete: {reason}", file=sys.stderr)
                return 1
            r = results[-1]
            print(
                f"{tool}: {r.found} found and {r.warnings} warnings in {r.tests} tests, {r.seconds:.0f} s", flush=True
            )
        if args.json is not None:
            rows = [
                {
                    "figure": f"compute-sanitizer {r.tool} over {args.test.name}",
                    "value": r.found,
                    "unit": "found",
                    "bar": "0",
                    "baseline": f"{r.tests} tests, {args.configs} random configurations among them, {r.seconds:.0f} s, "
                    f"{r.warnings} warnings; kernels "
                    f"{build_id(library)}, compute-sanitizer {version(command)}",
                    "machine": machine(),
                    "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                    "command": shlex.join(["python3", *sys.argv]),
                }
                for r in results
            ]
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(r.found for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
