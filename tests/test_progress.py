"""What a log says of a training's pace, by a clock made by hand."""

from types import SimpleNamespace

import pytest

from dsam import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_the_first_step_tells_no_pace_and_later_ones_the_true_one(clock, capsys):
    with progress.Bar("rte sam seed 0", 1000, every_seconds=0) as bar:
        clock.seconds += 60  # loading and a first, slow step
        bar.update(1, 0.7)
        assert "steps/s" not in capsys.readouterr().err
        clock.seconds += 12
        bar.update(11, 0.6)
    said = capsys.readouterr().err
    assert "step 11/1000  loss 0.6000  0.833 steps/s  20 min left" in said  # 10 steps in 12 s; 989 · 1.2 s


def test_a_resumed_run_s_pace_counts_its_own_steps_alone(clock, capsys):
    with progress.Bar("rte sam seed 0", 1000, every_seconds=0) as bar:
        bar.update(501, 0.7)
        clock.seconds += 10
        bar.update(511, 0.7)
    assert "1 steps/s  8 min left" in capsys.readouterr().err


def test_stages_speak_of_time_left_by_what_has_passed(clock, capsys):
    with progress.Stages("surface", 100, every_seconds=0) as stages:
        stages.enter("line")
        clock.seconds += 30
        stages.passed(25)
    assert "surface: line  25 %  2 min left" in capsys.readouterr().err  # 90 s
