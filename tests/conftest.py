"""What every test module shares."""

pytest_plugins = ("real_parts",)
