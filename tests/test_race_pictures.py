"""The picture of docs/results.md: drawn from the records that the page tells of."""

import json
import sys

import pytest
from conftest import REPOSITORY
from matplotlib.colors import to_hex

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import race_pictures

ORANGE, BLACK = "#ff7f0e", "#000000"


@pytest.mark.parametrize("folder", race_pictures.RACES)
def test_ours_and_the_best_rival_are_told_apart_and_all_are_drawn(folder):
    title = race_pictures.RACES[folder]
    record = json.loads((race_pictures.RESULTS / folder / "results.json").read_text())
    axis, *unused = race_pictures.draw({title: record}).axes
    assert axis.get_title() == title
    assert not any(panel.axison for panel in unused)
    lines = {bars.get_label(): to_hex(bars[0].get_color()) for bars in axis.containers}
    assert len(axis.containers) == len(record["entrants"])
    told_apart = {label: colour for label, colour in lines.items() if not label.startswith("_")}
    _header, _line, *rows = (race_pictures.RESULTS / folder / "table.md").read_text().split("\n\n")[1].splitlines()
    ranked = [row.split("`")[1] for row in rows]  # by compare.py
    (rival,) = (label for label, colour in told_apart.items() if colour == ORANGE)
    assert rival == next(name for name in ranked if not name.startswith("adaptive"))
    ours = {label for label, colour in told_apart.items() if colour == BLACK}
    assert ours == {name for name in ranked if name.startswith("adaptive")}
    assert told_apart.keys() == ours | {rival}


def test_the_picture_has_a_panel_a_race(tmp_path):
    path = tmp_path / "races.png"
    race_pictures.main(race_pictures.RacePictureOptions(output_png=str(path)))
    assert 20_000 < path.stat().st_size < 200_000
