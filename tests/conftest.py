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


@pytest.fixture
def make_installation(tmp_path):
    """A function that makes an Installation: the real program as a process, with a fake Forgejo; ended with the test."""
    from broker_process import Installation
    from fake_forgejo import FakeForgejo
    from rig import CHILD

    made = []

    def make(*, child=(), access_lifetime=3600, **arguments):
        folder = tmp_path / f"installation{len(made)}"
        folder.mkdir()
        forgejo = FakeForgejo(access_lifetime=access_lifetime).start()
        made.append(Installation(folder, forgejo, (*CHILD, *child), **arguments))
        return made[-1]

    yield make
    for installation in made:
        installation.close()
        installation.forgejo.stop()
