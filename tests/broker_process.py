"""A door for programs outside the suite, which name this module here: it is rigs/broker_process.py."""

from rigs.broker_process import *  # noqa: F403
