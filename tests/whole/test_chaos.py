"""A short run of tests/tools/chaos.py, and by name every failure that a run of it has found."""

from pathlib import Path

import pytest

from tools import chaos, fleet_chaos, hostile


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


@pytest.mark.real("postgresql")
@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize(
    "seed, only",
    [
        (1, {"kill_broker", "crash_at_a_commit"}),
        (2, {"kill_database", "restart_database", "fail_over", "refresh_everybody"}),
    ],
)
def test_brokers_and_their_database_die_and_nothing_is_lost(real_part, scale, seed, only):
    binaries = Path(real_part("postgresql")).parent
    steps = scale(3, 40)
    only = None if steps > 3 else only
    counts = fleet_chaos.run(seed, binaries, steps=steps, say=lambda text: None, only=only)
    assert counts["steps"] == steps and counts["calls: answered"] > 30


@pytest.mark.timeout(300)
def test_attackers_hurt_nobody_else_and_their_memory_comes_back(tmp_path):
    """How long /healthz takes is judged by `chaos.py --hostile`, where nothing else runs."""
    short = ("session_idle_timeout", "kept_time", "idle_timeout", "body_timeout", "input_timeout")
    settings = dict.fromkeys(short, "3s")  # a child waits that long for an answer to its questions
    seen = hostile.run(
        tmp_path, 10, say=lambda text: None, seconds_allowed=60, patience=100, seed=1, **settings
    )
    assert seen["calls"] > 3


def test_each_attack_is_one():
    names = [attack.__name__ for attack, _ in hostile.ATTACKS]
    assert len(set(names)) == len(names) > 10 and all(attack.__doc__ for attack, _ in hostile.ATTACKS)
