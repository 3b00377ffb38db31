"""ci/gpu_sanitizers.py counts what compute-sanitizer found, and takes nothing for clean that did not run. The tool, the tests and
nvidia-smi are stand-ins here: the command is for machines with a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tq_backend

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(tq_backend.__file__).parent / "libtq_kernels_cpu.so"  # has the table that names the build
# Runs the program, then says what FOUND has; errors give the exit code that was asked for.
TOOL = """#!{python}
import os, re, subprocess, sys
if "--version" in sys.argv:
    print("Version 2025.3.1.0 (build 1)")
    sys.exit(0)
tool, code, log = (sys.argv[sys.argv.index(o) + 1] for o in ("--tool", "--error-exitcode", "--log-file"))
done = subprocess.run(sys.argv[sys.argv.index(log) + 1:])
found, _, warnings = os.environ["FOUND"].partition("+")
warnings = warnings or "0"
assert ("--gtest_filter=-*TwoStreams*" in sys.argv) == (tool == "racecheck")
lines = {{"memcheck": f"========= ERROR SUMMARY: {{found}} errors",
         "racecheck": f"========= RACECHECK SUMMARY: 9 hazards displayed ({{found}} errors, {{warnings}} warnings)"}}
with open(log, "w") as f:
    f.write("========= COMPUTE-SANITIZER\\n" + (lines[tool] if found.isdigit() else found) + "\\n")
sys.exit(int(code) if tool == "memcheck" and found not in ("0", "none") or warnings != "0" and tool == "racecheck" else done.returncode)
"""
TESTS = """#!{python}
import json, os, sys, time
time.sleep(float(os.environ.get("SLEEP", "0")))
report = next(a for a in sys.argv if a.startswith("--gtest_output=json:")).partition("json:")[2]
tests = json.loads(os.environ["TESTS"])
if tests is not None:
    open(report, "w").write(json.dumps({{"testsuites": [{{"testsuite": tests}}]}}))
assert os.environ["TQ_TEST_CONFIGS"] == "7" and os.path.isabs(os.environ["TQ_TEST_CUDA_LIBRARY"])
sys.exit(any(t.get("failures") for t in tests or []))
"""
SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1'\n"
PASSED = {"classname": "AttendCuda", "name": "RandomGrid", "result": "COMPLETED"}


@pytest.fixture
def run(tmp_path: Path):
    for name, text in (("compute-sanitizer", TOOL), ("some_test", TESTS), ("nvidia-smi", SMI)):
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)

    def call(
        tests: object, found: str = "0", sleep: float = 0, seconds: int = 60
    ) -> tuple[subprocess.CompletedProcess, list]:
        out = tmp_path / "out.json"
        command = [
            sys.executable,
            "ci/gpu_sanitizers.py",
            "--test",
            tmp_path / "some_test",
            "--library",
            LIBRARY,
            "--json",
            out,
        ]
        command += ["--configs", "7", "--seconds", str(seconds)]
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "FOUND": found, "TESTS": json.dumps(tests), "SLEEP": str(sleep)}
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return done, json.loads(out.read_text()) if out.exists() else []

    return call


def test_clean_tools_are_written_with_what_they_ran(run):
    done, rows = run([PASSED, {**PASSED, "name": "LongContext"}])
    assert done.returncode == 0, done.stderr
    assert [(row["figure"].split()[1], row["value"], row["bar"]) for row in rows] == [
        ("memcheck", 0, "0"),
        ("racecheck", 0, "0"),
    ]
    for row in rows:
        assert row["machine"] == "NVIDIA H100 80GB HBM3, driver 580.1"
        assert row["baseline"].startswith("2 tests, 7 random configurations among them, ")
        assert (
            f"kernels {tq_backend.__version__}-" in row["baseline"]
            and "compute-sanitizer 2025.3.1.0" in row["baseline"]
        )
        assert row["command"].startswith("python3 ci/gpu_sanitizers.py --test ")


def test_findings_are_counted_and_fail(run):
    done, rows = run([PASSED], found="3")
    assert done.returncode == 1
    assert [row["value"] for row in rows] == [3, 3]
    assert "ERROR SUMMARY: 3 errors" in done.stdout and "(3 errors, 0 warnings)" in done.stdout


def test_warnings_are_told_and_do_not_fail(run):
    done, rows = run([PASSED], found="0+2")
    assert done.returncode == 0, done.stderr
    assert [row["value"] for row in rows] == [0, 0]
    assert " s, 0 warnings; " in rows[0]["baseline"] and " s, 2 warnings; " in rows[1]["baseline"]


@pytest.mark.parametrize(
    ("tests", "found", "reason"),
    [
        ([PASSED, {**PASSED, "result": "SKIPPED"}], "0", "AttendCuda.RandomGrid did not run: skipped"),
        ([{**PASSED, "failures": [{"failure": "no"}]}], "0", "AttendCuda.RandomGrid failed"),
        ([], "0", "there is no test"),
        (None, "0", "left no report of the tests"),
        ([PASSED], "none", "left no summary"),
    ],
)
def test_what_did_not_run_is_not_clean(run, tests, found, reason):
    done, rows = run(tests, found)
    assert done.returncode == 1
    assert f"memcheck is not complete: {reason}" in done.stderr or reason in done.stderr
    assert rows == []


def test_time_is_bounded(run):
    began = time.monotonic()
    done, rows = run([PASSED], sleep=30, seconds=1)
    assert time.monotonic() - began < 20, "the tests outlive the tool"
    assert done.returncode == 1
    assert "memcheck is not complete: the tests took longer than 1 s" in done.stderr
    assert rows == []
