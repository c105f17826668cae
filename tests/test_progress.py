"""Bars on a terminal, lines in a file."""

import io

import pytest

import progress
from progress import progress_bar


@pytest.fixture
def stream(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_a_bar_is_drawn_over_on_a_terminal(stream, monkeypatch):
    monkeypatch.setattr(stream, "isatty", lambda: True)
    list(progress_bar(range(3), desc="counting"))
    assert "\rcounting: 100%" in stream.getvalue()


def test_short_work_says_nothing_in_a_file(stream):
    list(progress_bar(range(3)))
    assert stream.getvalue() == ""


def test_long_work_writes_whole_lines_in_a_file(stream, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-6)  # everything is long
    list(progress_bar(range(3), desc="counting", mininterval=0))
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("counting: 100%")
    assert all(line.startswith("counting: ") for line in lines)
    assert "\r" not in stream.getvalue()


def test_a_disabled_bar_is_silent(stream, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-6)
    list(progress_bar(range(3), disable=True))
    assert stream.getvalue() == ""
