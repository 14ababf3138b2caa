"""What a run shows where no terminal is."""

from __future__ import annotations

import time

from raysweep.cli import display
from raysweep.cli.display import Display


def test_a_long_silence_is_broken_with_what_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(display, "SILENCE_S", 0.1)
    with Display("plain") as shown:
        time.sleep(0.25)
        shown.tick("audits", 1, 3)
        shown.tick("steps", 5, 5)
        time.sleep(0.25)
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert "working  still at it (0 s since the last event)" in lines
    assert "working  audits 1/3 (0 s since the last event)" in lines[lines.index("progress audits 1/3") :]
    time.sleep(0.25)
    assert capsys.readouterr().out == ""


def test_events_keep_the_silence_unbroken(monkeypatch, capsys):
    monkeypatch.setattr(display, "SILENCE_S", 5.0)
    with Display("plain") as shown:
        shown.say("trial", "000-rgd")
    assert capsys.readouterr().out.splitlines()[0].endswith("trial    000-rgd")
