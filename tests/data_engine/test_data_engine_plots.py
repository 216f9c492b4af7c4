"""Plots are written, and a notebook that calls the data engine keeps its own way of showing figures."""

import sys
from collections import Counter

import pytest
from PIL import Image
from test_data_engine_generate import Responder

from modeling_llava.data_engine.contexts import Context
from modeling_llava.data_engine.generate import generate
from modeling_llava.data_engine.plots import plot_concepts, plot_lengths
from modeling_llava.data_engine.run import GenerateConfig
from modeling_llava.data_engine.samples import OutputSettings


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


def test_absent_matplotlib_names_the_extra_and_costs_a_card_its_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"modeling-llava\[plots\]"):
        plot_lengths({}, tmp_path / "lengths.png")
    one = Context("a", "a.jpg", ("a thing number 1 on a table",))
    output = OutputSettings(parquet=False, report_samples=0)
    summary = generate(tmp_path / "run", Responder(), GenerateConfig("x"), contexts=[one], output=output)
    assert "matplotlib" in summary.output.notes[0] and (tmp_path / "run" / "README.md").is_file()
