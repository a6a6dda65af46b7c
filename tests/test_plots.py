"""Figures show the data they are given; pages stand alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moesim import plots


def line(figure, name: str):
    return next(trace for trace in figure.data if trace.name == name)


def test_miss_ratio_curve():
    lru = np.array([[0.8, 0.4, 0.0], [0.6, 0.2, 0.0]])
    figure = plots.miss_ratio_curve(np.array([2, 3, 4]), lru, lru / 2, lru + 0.1, np.array([0.5, 0.25, 0]))
    assert line(figure, "Belady's, which looks ahead").y == pytest.approx([35, 15, 0])
    assert line(figure, "LRU, mean over layers").y == pytest.approx([70, 30, 0])
    assert line(figure, "best fixed set, in hindsight").y == pytest.approx([80, 40, 10])
    assert line(figure, "random set").y == pytest.approx([50, 25, 0])
    band = line(figure, "layers, lowest to highest")
    assert band.y == pytest.approx([60, 20, 0, 0, 40, 80])
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (
        "experts cached per layer",
        "choices missed (%)",
    )


def test_windows_nobody_is_long_enough_for_are_left_out():
    within = {1: np.array([0.2, 0.4]), 2: np.array([0.5, 0.7]), 4: np.array([np.nan, np.nan])}
    figure = plots.reuse_curve(within, {w: np.array([0.1, 0.1]) for w in within})
    assert list(line(figure, "measured, mean over layers").x) == [1, 2]
    assert line(figure, "measured, mean over layers").y == pytest.approx([30, 60])


def test_distance_curve_leaves_first_uses_out_but_counts_them():
    figure = plots.distance_curve(np.array([[2, 1, 1]]))
    assert line(figure, "mean over layers").y == pytest.approx([50, 75])


def test_unique_experts():
    values = np.array([[2.0, 3.5]])
    figure = plots.unique_experts(np.array([1, 2]), values, values + 0.1, 8)
    assert line(figure, "measured, mean over layers").y == pytest.approx([2, 3.5])
    assert line(figure, "independent tokens").y == pytest.approx([2.1, 3.6])
    assert figure.layout.shapes[0].y0 == 8


def test_heatmaps_and_predictability():
    popularity = plots.popularity_heatmap(np.array([[0.75, 0.25]]), [3])
    assert popularity.data[0].z.tolist() == [[1.5, 0.5]]
    assert popularity.data[0].y == ("3",)
    distance = np.array([[0, 0.3], [0.3, 0]])
    tasks = plots.task_distances(["a", ""], distance, np.array([0.1, np.nan]))
    assert tasks.data[0].z[0].tolist() == [0.1, 0.3]
    assert tasks.data[0].x == ("a", "(none)")
    assert distance[0, 0] == 0, "the caller's data stays as it was"
    found = plots.predictability([1, 2, 3], np.array([0.5, 0.6]), np.array([0.1, 0.2]))
    assert list(line(found, "from the layer before").x) == [2, 3]


def test_a_page_stands_alone(tmp_path):
    figures = [plots.distance_curve(np.array([[2, 1, 1]])) for _ in range(2)]
    plots.write_page(tmp_path / "page.html", "A <model>", "so & so", figures, "details")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script[^>]+src=|<link|<img", page)
    assert page.count("plotly.js v") == 1
    assert page.count("<section>") == 2
    assert "<h1>A &lt;model&gt;</h1>" in page
    assert "so &amp; so" in page


def test_predicted_against_measured_shows_every_point_and_its_band():
    points = {"a": [(1.0, 1.1, "one"), (10.0, 8.0, "ten")], "b": [(100.0, 100.0, "hundred")]}
    figure = plots.predicted_against_measured("ms", points)
    assert list(line(figure, "a").x) == [1.0, 10.0] and list(line(figure, "a").y) == [1.1, 8.0]
    assert line(figure, "+- 20%").y == pytest.approx(1.2 * line(figure, "exact").x)
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
