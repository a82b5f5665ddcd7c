"""A door for programs outside the suite, which name this module here: it is rigs/fake_forgejo.py."""

from rigs.fake_forgejo import *  # noqa: F403
