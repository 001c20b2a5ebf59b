"""Runs every *.case file below this folder through the real program.

A case: lines of `#` that describe it, a recipe (written to run.yml, so that its first line is line 1), then steps in order:

    ---- plan [arguments]: exit N
        runs the program; the lines that follow must be printed, in any place. Where it fails they are printed once: one
        failure, one sentence. A line after `not: ` must not be printed.
    ---- setup FUNCTION [arguments]
        calls a function of fixtures.py, which may also check what the commands left.
    ---- env NAME=VALUE ...
    ---- limit BYTES
        hold for the commands that follow; no file of theirs may grow beyond so many bytes.

`---- file NAME` begins another file, written before the first step. The recipe is run.yml unless the arguments name a
*.yml file; without any text before the first `----` there is none, unless a setup writes it.
"""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

import fixtures

HERE = pathlib.Path(__file__).resolve().parent
ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", HERE.parents[1] / "build")).resolve() / "ulysses"
COMMAND = re.compile(r"---- (?P<verb>[a-z]+)(?P<arguments>.*): exit (?P<exit>\d+)$")
INTERNAL = 70


def parse(text):
    """Returns {file name: text} and the steps: (verb, arguments, exit status or None, expected lines)."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    files, steps, name = {}, [], "run.yml"
    for line in lines:
        found = COMMAND.match(line.rstrip("\n"))
        if line.startswith("---- file "):
            name = line.removeprefix("---- file ").strip()
            files[name] = ""
        elif line.startswith(("---- setup ", "---- env ", "---- limit ")):
            name = None
            _, verb, *arguments = shlex.split(line)
            steps.append((verb, arguments, None, []))
        elif found:
            name = None
            steps.append((found["verb"], shlex.split(found["arguments"]), int(found["exit"]), []))
        elif line.startswith("----"):
            raise ValueError(f"not a step: {line}")
        elif name is not None:
            files[name] = files.get(name, "") + line
        elif line.strip():
            steps[-1][3].append(line.rstrip("\n"))
    return files, steps


def run(folder, environment, limit, verb, arguments, status, expected):
    recipe = [] if any(argument.endswith((".yml", ".yaml")) for argument in arguments) else ["run.yml"]
    command = ["prlimit", f"--fsize={limit}", str(ULYSSES), verb, *recipe, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, errors="replace")
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert "Traceback" not in output and (status == INTERNAL or "internal error" not in output), output
    for line in expected:
        unwanted = line.startswith("not: ")
        count = output.count(line.removeprefix("not: "))
        assert count == 0 if unwanted else count == 1 or (count > 1 and status == 0), output


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.case")), ids=lambda path: str(path.relative_to(HERE)))
def test_case(path, tmp_path, request):
    files, steps = parse(path.read_text())
    assert any(status is not None for _, _, status, _ in steps), "a case without a command"
    for name, text in files.items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    environment, limit = fixtures.environment(), "unlimited"
    for verb, arguments, status, expected in steps:
        if verb == "setup":
            clean_up = getattr(fixtures, arguments[0])(tmp_path, *arguments[1:])
            if clean_up is not None:
                request.addfinalizer(clean_up)
        elif verb == "env":
            environment.update(argument.split("=", 1) for argument in arguments)
        elif verb == "limit":
            limit = arguments[0]
        else:
            run(tmp_path, environment, limit, verb, arguments, status, expected)
