import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "cases"))

import machines as machines_  # noqa: E402


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """Two hosts, and the folder whose `bin` has to come first on PATH."""
    folder = tmp_path_factory.mktemp("machines")
    folder.chmod(0o755)
    try:
        with machines_.machines(folder) as hosts:
            yield hosts, folder
    except machines_.Unavailable as why:
        pytest.skip(str(why))
