"""A short run of tests/tools/scale.py: what is checked there holds; what is measured decides nothing."""

from tools import scale


def test_many_sessions_few_children_and_nothing_kept_at_rest(tmp_path):
    said = []
    found = scale.run(
        tmp_path, sessions=200, awake=5, requests=60, streams=100, cycles=30, wakes=5, say=said.append
    )
    assert found["tasks"] > 100 and found["memory"] > 20 << 20
    assert found["grown"] < 8 << 20  # no cycle keeps anything: 30 of them would show
    assert len(said) >= 8
