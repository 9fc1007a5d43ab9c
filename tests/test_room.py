"""How many runs a device takes: by hand, and whatever runs come and go."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsam.config import Launcher
from dsam.errors import UserError
from dsam.sweeps import room
from dsam.sweeps.room import Room, at_once

SIZES = st.integers(0, 200 * 10**9)


def test_as_many_as_the_memory_holds_and_the_cores_allow():
    assert at_once(in_use=5_200_000_000, total=85_000_000_000, cores=64, devices=1) == 16
    assert at_once(in_use=5_200_000_000, total=85_000_000_000, cores=64, devices=8) == 8
    assert at_once(in_use=60_000_000_000, total=85_000_000_000, cores=64, devices=1) == 1
    assert at_once(in_use=1_000_000_000, total=85_000_000_000, cores=2, devices=4) == 1


@given(SIZES, SIZES, st.integers(1, 512), st.integers(1, 16), st.integers(1, 10**9))
def test_more_than_one_only_where_all_fit(in_use, total, cores, devices, more):
    number = at_once(in_use, total, cores, devices)
    assert number >= 1
    if number > 1:
        assert number * in_use <= total and number * devices <= cores
    assert at_once(in_use + more, total, cores, devices) <= number
    assert at_once(in_use, total + more, cores, devices) >= number
    if number < 1024:  # no more would do
        assert (number + 1) * max(1, in_use) > total or (number + 1) * devices > cores


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_device_has_more_than_it_takes_and_one_alone_has_no_other(data):
    devices = data.draw(st.sampled_from([None, ["0"], ["0", "3"]]))
    per_device = data.draw(st.sampled_from([1, 2, 3, "auto"]))
    places = Room(Launcher(devices=devices, per_device=per_device, workers=3))
    auto, running, told = places.auto, [], set()
    for _ in range(data.draw(st.integers(1, 30))):
        alone = data.draw(st.booleans())
        if (place := places.take(alone)) is not None:
            running.append((place, alone))
        beside = [(p, a) for p, a in running if place is not None and p.device == place.device]
        assert len(beside) <= 1 or (not any(a for _, a in beside) and len(beside) <= place.most)
        assert place is not None or all(
            any(p.device == device for p, _ in running) if alone else True for device in places.most
        )
        if auto:
            assert all(most == 1 for device, most in places.most.items() if device not in told)
        if running and data.draw(st.booleans()):
            place, _ = running.pop(data.draw(st.integers(0, len(running) - 1)))
            places.leave(place)
            if data.draw(st.booleans()):
                before = places.most[place.device]
                places.lower(place)
                assert places.most[place.device] == (max(1, before - 1) if auto else before)
            elif places.learn(place, {"in_use": 1, "total": data.draw(st.integers(1, 8))}):
                assert auto and place.device not in told
                told.add(place.device)
    for place, _ in running:
        places.leave(place)
    assert not any(places._taken.values())


def test_runs_spread_over_the_devices():
    places = Room(Launcher(devices=["3", "5"], per_device=2))
    assert [places.take().device for _ in range(4)] == ["3", "5", "3", "5"]
    assert places.take() is None and places.take(alone=True) is None


def test_what_a_run_without_a_gpu_or_another_device_says_changes_nothing(monkeypatch):
    monkeypatch.setattr(room, "cpus", lambda: 16)
    places = Room(Launcher(devices=["0", "1"], per_device="auto"))
    place = places.take()
    places.leave(place)
    assert places.learn(place, None) == "" and places.most == {"0": 1, "1": 1}
    assert places.learn(place, {"in_use": 10**9, "total": 5 * 10**9}).endswith("5 runs at once from here on")
    assert places.learn(place, {"in_use": 10**9, "total": 2 * 10**9}) == "" and places.most == {"0": 5, "1": 1}
    given = Room(Launcher(devices=["0"], per_device=2))
    assert given.learn(given.take(), {"in_use": 1, "total": 10}) == given.lower(place) == "" and given.most == {"0": 2}


def test_slurm_wants_a_number():
    with pytest.raises(UserError, match="per_device=auto is for launcher=local"):
        Launcher(name="slurm", per_device="auto")
