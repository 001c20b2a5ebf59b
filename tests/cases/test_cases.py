"""Runs every *.case file below this folder through the real program.

A case: lines of `#` that describe it, a recipe (written to run.yml, so that its first line is line 1), then commands
and the lines that each must print, anywhere in its output:

    ---- plan [arguments]: exit N

`---- file NAME` begins another file. The recipe is run.yml unless the arguments name a *.yml file; without any text
before the first `----` there is none.
"""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", HERE.parents[1] / "build")).resolve() / "ulysses"
COMMAND = re.compile(r"---- (?P<verb>[a-z]+)(?P<arguments>.*): exit (?P<exit>\d+)$")


def parse(text):
    """Returns {file name: text} and [(verb, arguments, exit status, expected lines)]."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    files, commands, name = {}, [], "run.yml"
    for line in lines:
        found = COMMAND.match(line.rstrip("\n"))
        if line.startswith("---- file "):
            name = line.removeprefix("---- file ").strip()
            files[name] = ""
        elif found:
            name = None
            commands.append((found["verb"], shlex.split(found["arguments"]), int(found["exit"]), []))
        elif line.startswith("----"):
            raise ValueError(f"not a command: {line}")
        elif name is not None:
            files[name] = files.get(name, "") + line
        elif line.strip():
            commands[-1][3].append(line.rstrip("\n"))
    return files, commands


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.case")), ids=lambda path: str(path.relative_to(HERE)))
def test_case(path, tmp_path):
    files, commands = parse(path.read_text())
    assert commands, "a case without a command"
    for name, text in files.items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for verb, arguments, status, expected in commands:
        recipe = [] if any(argument.endswith((".yml", ".yaml")) for argument in arguments) else ["run.yml"]
        done = subprocess.run([str(ULYSSES), verb, *recipe, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        for line in expected:
            assert line in output, output
