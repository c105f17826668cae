"""Bars on a terminal, lines in a file."""

import sys

import progress
from progress import progress_bar


def test_a_bar_is_drawn_over_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(progress_bar(range(3), desc="counting"))
    assert "\rcounting: 100%" in capsys.readouterr().err


def test_short_work_says_nothing_in_a_file(capsys):
    list(progress_bar(range(3)))
    assert capsys.readouterr().err == ""


def test_long_work_writes_whole_lines_in_a_file(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-6)  # everything is long
    list(progress_bar(range(3), desc="counting"))
    text = capsys.readouterr().err
    assert text.splitlines()[-1].startswith("counting: 100%")
    assert all(line.startswith("counting: ") for line in text.splitlines())
    assert "\r" not in text


def test_a_disabled_bar_is_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-6)
    list(progress_bar(range(3), disable=True))
    assert capsys.readouterr().err == ""
