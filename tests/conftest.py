"""What every test module shares."""

import pytest

pytest_plugins = ("real_parts",)


@pytest.fixture
def make_rig(tmp_path):
    """A function that makes a Rig (broker, fake Forgejo, children); all of it is ended with the test."""
    from rig import Rig

    made = []

    def make(**arguments):
        folder = tmp_path / f"rig{len(made)}"
        folder.mkdir()
        made.append(Rig(folder, **arguments))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig):
    """A Rig with the usual settings."""
    return make_rig()
