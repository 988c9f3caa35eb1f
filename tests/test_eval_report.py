"""The evaluation's tables and page: every number with its controls, no text that becomes markup, nothing asked for."""

from __future__ import annotations

import copy
import json
import re
import xml.dom.minidom

import numpy as np
import pytest
from eval_results import DENOMINATOR, results
from html_page import Page

from nla_jax.errors import InputError
from nla_jax.tools.eval_report import estimate, lines, markdown, number, read_results, tables, under
from nla_jax.tools.eval_report_page import page
from nla_jax.tools.eval_report_plots import Plot, draw, plots


@pytest.fixture
def found():
    return results()


def suite(found, name):
    return next(s for s in found["suites"] if s["suite"] == name)


def before(found):
    """The same evaluation of another pair: values halved."""
    other = copy.deepcopy(found)
    for s in other["suites"]:
        for row in s["rows"]:
            row["value"] = None if row["value"] is None else row["value"] / 2
    return other


def test_each_control_stands_beside_its_number(found):
    shown = lines(suite(found, "fve"))
    first = shown[0]
    assert (first.row["metric"], first.row["group"]) == ("fve_nrm", "")
    assert [c["control"] for c in first.controls] == ["constant floor", "shuffled pairs"]
    assert [c["value"] for c in shown[1].controls] == [0.00012]
    assert not any(line.controls for line in shown if line.row["group"])
    of_best = lines(suite(found, "best-of-k"))
    assert of_best[-1].row["control"] == "mean of k"  # of no measured row: not lost
    for name in ("fve", "best-of-k"):
        rows = suite(found, name)["rows"]
        assert sum(1 + len(line.controls) for line in lines(suite(found, name))) == len(rows)


def test_another_evaluation_stands_beside(found):
    other = before(found)
    shown = lines(suite(found, "fve"), suite(other, "fve"))
    assert shown[0].beside["value"] == pytest.approx(0.8781 / 2)
    assert all(line.beside["group"] == line.row["group"] for line in shown)
    text = markdown(found, other)
    assert "| fve_nrm |  | 0.878 [0.860, 0.896] | 0.439 [0.860, 0.896] | 1000 (200 docs) |" in text
    other["suites"] = [suite(other, "fve")]
    assert lines(suite(found, "best-of-k"), None)[0].beside is None
    assert "0.439" in page(found, other)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8781, "0.878"),
        (0.0, "0.000"),
        (-0.00012, "-0.0001"),
        (2e-6, "2.00e-06"),
        (-1234.5, "-1.23e+03"),
        (None, "-"),
        (np.nan, "-"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_number_without_interval_has_no_brackets(found):
    masked = next(r for r in suite(found, "fve")["rows"] if r["group"] == "masked")
    assert estimate(masked) == "0.200" and estimate(None) == "-"


def test_markdown_is_one_table_a_suite_whatever_the_texts_are(found):
    text = markdown(found)
    assert "- fve_nrm, masked: one document: no interval" in text
    assert f"- denominator of fve_nrm: {DENOMINATOR}" in text and "- the data has no splits" in text
    assert "constant floor -0.354; shuffled pairs -0.900 [-0.950, -0.870]" in text
    assert "Downstream: not done, it needs the target (--target)." in text
    assert "95%, bootstrapped by document, 2000 resamples, seed 42" in text
    tables_of = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables_of) == 2
    for table in tables_of:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "<script" not in text and "\x1b" not in text and "[e](http" not in text


def test_the_terminal_has_the_same_numbers(found):
    from rich.console import Console

    console = Console(width=120, no_color=True, record=True, file=open("/dev/null", "w"))
    for table, more in tables(found, before(found)):
        console.print(table)
        assert "\x1b" not in "".join(more)
    text = console.export_text()
    for words in ("0.878 [0.860, 0.896]", "0.439", "control: shuffled pairs", "30 (1 doc)", "position 100-199"):
        assert words in text, words


def test_notes_of_many_rows_are_said_once(found):
    rows = [{**r, "note": "rough"} for r in suite(found, "fve")["rows"]]
    said = [text for text in under({"rows": rows, "notes": []}) if text.endswith(": rough")]
    assert said == [
        "fve_nrm (5 rows); fve_nrm (constant floor); fve_nrm (shuffled pairs); fve_calibrated; and 3 more rows: rough"
    ]


def test_denominators_that_differ_stand_with_their_rows(found):
    rows = [{**found["suites"][0]["rows"][0], "group": f"next {n}", "denominator": f"KL {n}"} for n in (1, 2, 4)]
    text = markdown({**found, "suites": [{"suite": "downstream", "rows": rows, "notes": []}]})
    assert "| fve_nrm | next 2 (denominator: KL 2) | 0.878" in text and "- denominator of" not in text
    rows[2]["denominator"] = "KL 2"
    text = markdown({**found, "suites": [{"suite": "downstream", "rows": rows, "notes": []}]})
    assert "| fve_nrm | next 2 | 0.878" in text and "- denominator of fve_nrm: KL 1" in text


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_every_number_and_asks_for_nothing(found):
    text = page(found, before(found))
    parsed = Page(text)
    for s in found["suites"]:
        for row in s["rows"]:
            assert row["value"] is None or number(row["value"]).replace("-", "−") in parsed.words
            assert row["control"] in parsed.words and row["group"] in parsed.words
    assert "default-src 'none'" in text and "script" not in parsed.tags
    assert not re.search(r"@import|@font-face|src=|<link|data:image", text)
    assert all(v is None or v[0] == "#" for k, v in parsed.attributes if k == "href")
    ids = [v for k, v in parsed.attributes if k == "id"]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert parsed.tags.count("table") == 3  # two suites and the provenance
    assert "a" * 64 in parsed.words and "Not done" in parsed.words and "needs the target" in parsed.words


def test_no_text_becomes_markup(found):
    text = page(found)
    assert "<script" not in text.lower() and text.count("</style>") == 1 and "\x1b" not in text
    assert "<script>alert(1)</script>" in Page(text).words


def test_the_page_is_the_same_for_the_same_results(found):
    assert page(found) == page(json.loads(json.dumps(found)))


def test_results_of_nothing_give_a_page():
    empty = {"format": "nla_jax.eval", "suites": [], "models": {}}
    Page(page(empty))
    assert markdown(empty).startswith("# Evaluation")


# -- charts -----------------------------------------------------------------------------------------------------------


def test_series_of_one_title_share_a_chart(found):
    best, calibration = plots(suite(found, "best-of-k")["series"])
    assert [c.label for c in best.curves] == ["best", "mean of k"] and not best.bars
    assert [c.style for c in best.curves] == ["-", "--"]
    assert calibration.diagonal and not best.diagonal
    (bars,) = plots(suite(found, "fve")["series"])
    assert bars.bars and np.isnan(bars.curves[0].y[2])


def test_curves_of_another_evaluation_join_the_charts(found):
    series = suite(found, "best-of-k")["series"]
    other = {**series, "only there": series["best"]}
    best, _ = plots(series, other)
    assert [(c.label, c.style) for c in best.curves] == [("best", "-"), ("mean of k", "--"), ("best, beside", ":")]
    assert "best, beside" in page(found, before(found))


def test_places_are_put_in_order():
    (plot,) = plots({"a": {"x": [4, 1, 2], "y": [40, 10, 20], "low": [4, 1, 2], "high": None}})
    (curve,) = plot.curves
    assert curve.x == (1, 2, 4) and curve.y.tolist() == [10, 20, 40] and curve.low.tolist() == [1, 2, 4]
    assert np.isnan(curve.high).all() and plot.title == "a"


def test_more_series_than_colours_make_more_charts():
    many = {f"s{i}": {"title": "t", "x": [1, 2], "y": [i, i]} for i in range(8)}
    assert [len(plot.curves) for plot in plots(many)] == [6, 2]


@pytest.mark.parametrize("series", [None, [], {"x": 1}, {"x": [], "y": []}, {"x": ["a"], "y": ["b"]}])
def test_what_cannot_be_drawn_is_left_out(series):
    assert plots({"a": series}) == []


@pytest.mark.parametrize(
    "series",
    [
        {"x": [1], "y": [0.5], "low": [0.4], "high": [0.6]},
        {"x": [10, 100, 1000], "y": [0.9, 0.5, 0.1]},
        {"x": [0, 1, 2], "y": [1, 1, 1]},
        {"x": [1, 2, 3], "y": [5.0, 1e-3, 1e-8], "low": [4.0, -1e-3, 0.0], "high": [6.0, 2e-3, 2e-8]},
        {"x": [-1, 0, 1], "y": [1e30, -1e-30, None]},
        {"x": ["a & <b>", "c"], "y": [-0.2, None], "low": [-0.3, None], "high": [0.1, None]},
        {"x": [f"name {i}" for i in range(60)], "y": [0.1] * 60},
        {"x": list(range(50)), "y": [0.1] * 50, "low": [None] * 50, "high": [0.2] * 50},
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_series_gives_an_element_in_the_colours_of_the_page(series):
    (plot,) = plots({"calibration": {"title": "t", "xlabel": "a", "ylabel": "b & <c>", **series}})
    assert isinstance(plot, Plot)
    svg = draw(plot, "f")
    root = xml.dom.minidom.parseString(svg).documentElement
    assert root.tagName == "svg" and "var(--c0)" in svg and "b &amp; &lt;c&gt;" in svg
    assert not re.search(r"#[0-9a-f]{6}|<style|<metadata|\bnan\b|\binf\b", svg)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_results_are_read_from_file_or_directory(tmp_path, found):
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected a results\.json of nla eval, got none\. Try"),
        ("{", "not readable as JSON"),
        ("[1]", r"expected a results\.json of nla eval .*got list"),
        ('{"format": "nla_jax.explain"}', r"got nla_jax\.explain"),
        ('{"format": "nla_jax.eval", "format_version": 9}', "format_version: expected 1, got 9"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_results(tmp_path, "--beside")
    assert "\n" not in str(error.value)
