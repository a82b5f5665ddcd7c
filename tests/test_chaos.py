"""A short run of tests/chaos.py, and by name every failure that a run of it has found."""

import pytest

import chaos


@pytest.mark.timeout(300)  # a few seconds where nothing else runs; what hangs is found by the run itself
@pytest.mark.parametrize("seed, tmpfs", [(1, True), (4, False)])
def test_a_short_run_breaks_nothing_that_must_hold(seed, tmpfs):
    counts = chaos.run(seed, steps=3, say=lambda text: None, tmpfs=tmpfs)
    assert counts["steps"] == 3 and counts["calls: answered"] > 50


@pytest.mark.parametrize(
    "name", ["kill_children", "kill_broker", "crash_at_a_commit", "fill_disk", "break_forgejo"]
)
def test_each_disturbance_does_what_it_says(tmp_path, name):
    world = chaos.World(tmp_path, 3, seats=1, tmpfs=False)
    try:
        world.STEPS = [step for step in world.STEPS if step[0].__name__ == name]
        world.step(lambda text: None)
        assert world.counts["steps"] == 1
        words = {
            "kill_children": "children killed",
            "kill_broker": "broker killed",
            "fill_disk": "disk filled",
            "break_forgejo": "Forgejo",
            "crash_at_a_commit": "at a commit",
        }
        assert [
            count for what, count in world.counts.items() if words[name] in what or "commits never" in what
        ]
    finally:
        world.close()
