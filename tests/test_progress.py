"""Signs of life: a bar on a terminal, lines now and then elsewhere, nothing unless asked for."""

import pytest

from convfusion import progress
from convfusion.progress import Progress, announced


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)


def work(bars, clock, steps=10, seconds=4.0, **options):
    bar = bars.add("drawing", total=steps, **options)
    for _ in range(bar.done, steps):
        clock.now += seconds
        bar.advance()


def test_without_a_terminal_a_line_now_and_then_says_what_is_left(capsys):
    clock = Clock()
    with Progress(True, interval=15, clock=clock) as bars:
        work(bars, clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "drawing: 4 of 10, 0:00:24 left",
        "drawing: 8 of 10, 0:00:08 left",
        "drawing: 10 of 10, 0:00:40 in all",
    ]


def test_what_lies_behind_a_resumed_run_is_not_counted_as_fast(capsys):
    clock = Clock()
    with Progress(True, interval=15, clock=clock) as bars:
        work(bars, clock, done=5)
    assert "drawing: 9 of 10, 0:00:04 left" in capsys.readouterr().err


def test_short_work_and_work_nobody_asked_about_print_nothing(capsys):
    clock = Clock()
    with Progress(True, interval=15, clock=clock) as bars:
        work(bars, clock, seconds=1.0)
    with Progress(clock=clock) as bars, announced("Loading …"):  # a pipe, by default
        work(bars, clock)
        bars.say("a line")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_on_standard_error(capsys, terminal):
    with Progress() as bars:
        bars.add("nothing yet", total=3)
        assert capsys.readouterr().err == ""
        bars.add("[/b] :smile:", total=3).update(3)
    out, err = capsys.readouterr()
    assert out == "" and "[/b] :smile:" in err and "3/3" in err


def test_bars_within_another_are_silent(capsys, terminal):
    with Progress() as bars:
        bars.add("outer", total=1).advance()
        with Progress() as inner:
            assert not inner.shown
    assert progress.is_shown(None)
