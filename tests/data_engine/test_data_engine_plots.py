"""Plots are written, and a notebook that calls the data engine keeps its own way of showing figures."""

from collections import Counter

import pytest
from PIL import Image

from modeling_llava.data_engine.plots import plot_concepts, plot_lengths


def test_plots_are_written_and_the_callers_backend_stays(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`)")
    before = matplotlib.get_backend()
    matplotlib.use("template")
    plot_lengths({"conversation": Counter({3: 2, 9: 1})}, tmp_path / "lengths.png")
    plot_concepts([5, 3, 1], [3, 3, 0], 3, tmp_path / "concepts.png")
    after = matplotlib.get_backend()
    matplotlib.use(before)
    assert after == "template"
    for name in ("lengths", "concepts"):
        assert Image.open(tmp_path / f"{name}.png").getcolors(2**20)[0] is not None
