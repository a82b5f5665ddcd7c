"""What is tested here with a rig holds on both engines of the store.

A module about something else overrides `engine`.
"""

import base64

import pytest


@pytest.fixture
def store_settings(engine, request):
    """A function that returns the settings of a new store, on each engine in turn."""
    if engine == "sqlite":
        return dict
    new_database = request.getfixturevalue("new_database")
    key = base64.b64encode(b"k" * 32).decode()

    def settings():
        place = new_database()
        return {"store_url": place.url, "store_password": place.password, "key": key}

    return settings
