"""The training report: every metric by its name, no text that becomes markup, and a page for any run whatsoever."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from html_page import Page

from nla_jax.train.report import report_page, write_report
from nla_jax.train.report_plots import Chart, draw, line
from nla_jax.train.report_read import evaluation_rows, read_run, read_stage

HOSTILE = '<script>alert(1)</script> & "q" \' </style> \ud800 \x00 {{title}}'


def written(directory: Path, metrics: list[dict], samples: list[dict] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples:
        (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return directory


def rl_rows() -> list[dict]:
    rows: list[dict] = [{"step": 0, "run": {"settings": {"steps": 20, "av_optim": {"lr": 0.01}}, "from": [HOSTILE]}}]
    for step in range(21):
        if step:
            row = {"step": step, "reward": -1 / step, "kl": None if step == 7 else 0.1, "skipped": int(step == 5)}
            counts = {"bad_vectors": 2 * (step == 3), "parse_failures": 1, "length": 20.0, "time": 1e9}
            models = {f"{m}/{n}": 0.5 for m in ("av", "ar") for n in ("loss", "grad_norm", "lr")}
            rows.append({**row, **counts, **models, "odd_metric": 3.25})
        if step % 10 == 0:
            fve = {0: 0.3, 10: 0.7, 20: 0.6}[step]
            rows.append(
                {
                    "step": step,
                    "eval/fve_nrm": fve,
                    "eval/fve_nrm_greedy": fve + 0.1,
                    "eval/fve_nrm_teacher": 0.5,
                    "eval/fve_nrm_shuffle": fve - 0.05,
                    "eval/fve_calibrated": fve,
                    "eval/fve_shuffled_calibrated": 0.001,
                    "eval/failed_share": 0.02 - step / 1000,
                }
            )
    return rows


def sample(step: int, row: int, explanation: str, **more) -> dict:
    shown = {"row": row, "doc": row, "context": "the rope", "failed": False, "cosine": 0.5, "mse_nrm": 0.25}
    return {"step": step, "explanation": explanation, **shown, **more}


SAMPLES = [
    sample(0, 1, "Before one."),
    sample(0, 2, HOSTILE, failed=True),
    sample(10, 1, "In between."),
    sample(20, 2, "After two.", cosine=float("nan"), context="x" * 999 + HOSTILE),
    sample(20, 1, "After one."),
]


@pytest.fixture
def run(tmp_path) -> Path:
    loss = [{"step": s, "loss": 5.0 - s, "eval/loss": 5.5 - s} for s in (1, 2, 3)]
    written(tmp_path / "demo" / "lm", loss)
    written(tmp_path / "demo" / "ar", [{"step": s, "loss": 1.0, "eval/fve_nrm_teacher": s / 10} for s in (1, 2)])
    return written(tmp_path / "demo" / "rl", rl_rows(), SAMPLES)


def test_the_page_has_every_metric_and_asks_for_nothing(run, tmp_path):
    out = tmp_path / "report.html"
    write_report(run, out)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    for row in rl_rows():
        for name in row:
            assert name in ("step", "run", "time") or name in text, name
    assert "default-src 'none'" in text and "script" not in page.tags
    assert not re.search(r"//[a-z]|@import|@font-face|src=|<link|data:", text)
    assert all(v is None or v[0] == "#" for k, v in page.attributes if k == "href")
    ids = [v for k, v in page.attributes if k == "id"]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert len(ids) == len(set(ids)) and used == set(ids)
    assert len(text) < 400_000 and list(tmp_path.glob(".*")) == []


def test_the_report_is_the_same_for_the_same_numbers(run):
    assert report_page(run) == report_page(run)


def test_no_text_becomes_markup(run):
    text = report_page(run)
    assert "alert(1)" in text and "<script" not in text.lower()
    assert text.count("</style>") == 1 and "{{title}}" in text and "\x00" not in text
    words = Page(text).words
    assert '<script>alert(1)</script> & "q" \' </style>' in words


def test_samples_stand_side_by_side(run):
    text = report_page(run)
    assert "at step 0 and at step 20" in text and "In between" not in text
    first, second = re.findall(r"<article.*?</article>", text, re.DOTALL)  # in the order of the last evaluation
    assert "After two." in second + first and second.index("Before one.") < second.index("After one.")
    assert "does not parse" in first and "… " in first and "cosine –" in first and "does not parse" not in second


def test_an_unchanged_text_is_shown_once(tmp_path):
    samples = [sample(5, 1, "Teacher.", cosine=0.1), sample(9, 1, "Teacher.", cosine=0.9)]
    text = report_page(written(tmp_path / "ar", [{"step": 5, "loss": 1.0}], samples))
    assert text.count("Teacher.") == 1 and "cosine 0.100" in text and "cosine 0.900" in text


def test_first_last_and_best_are_told_apart(run):
    rows = {row.name: row for row in evaluation_rows(read_stage(run))}
    assert rows["eval/fve_nrm"].first == (0, 0.3)
    assert rows["eval/fve_nrm"].last == (20, 0.6)
    assert rows["eval/fve_nrm"].best == (10, 0.7)
    assert rows["eval/failed_share"].best == (20, 0.0)  # less is better
    assert rows["eval/fve_nrm_teacher"].best == (0, 0.5)  # the first of equals
    assert rows["eval/fve_shuffled_calibrated"].best is None  # a control has none
    main = re.search(r'<tr class="main">.*?</tr>', report_page(run))
    assert main and re.findall(r"0\.\d+ <small>step \d+", main[0]) == [
        "0.300 <small>step 0",
        "0.600 <small>step 20",
        "0.700 <small>step 10",
    ]


def test_what_went_wrong_is_shown_and_counted(run):
    text = report_page(run)
    for what, count in [("samples that do not parse", 20), ("updates skipped", 1), ("unusable vectors", 2)]:
        assert f'<div class="poor"><dt>{what}</dt><dd>{count}<' in text
    assert "Updates skipped, vectors unusable" in text
    clean = [
        {k: 0 if k in ("skipped", "bad_vectors", "parse_failures") else v for k, v in r.items()} for r in rl_rows()
    ]
    text = report_page(written(run, clean))
    assert "<dt>updates skipped</dt><dd>0<" in text and 'class="poor"' not in text
    assert "Updates skipped, vectors unusable" not in text


def test_the_stages_beside_are_in_the_page(run):
    text = report_page(run)
    places = [text.index(words) for words in ("Joint reinforcement", "Target language model, 3 steps", "AR warm start")]
    assert places == sorted(places) and "AV warm start" not in text
    # The directory of all stages stands for the last of them.
    assert report_page(run.parent) == text
    stage, others = read_run(run.parent / "lm")
    assert stage is not None and stage.name == "lm" and [other.name for other in others] == ["ar", "rl"]


@pytest.mark.parametrize("what", ["missing", "no files", "empty files", "only described", "file"])
def test_a_run_without_numbers_gets_a_page_that_says_so(tmp_path, what):
    run = tmp_path / "rl"
    if what == "file":
        run.write_text("not a directory")
    elif what != "missing":
        rows = [{"step": 0, "run": {"a": 1}}] if what == "only described" else []
        written(run, rows)
        if what == "no files":
            (run / "metrics.jsonl").unlink()
    write_report(run, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "No numbers yet" in text and not any(tag == "svg" for tag in Page(text).tags)


def test_damaged_and_odd_lines_cost_nothing_but_themselves(tmp_path):
    run = written(tmp_path / "rl", [{"step": 1, "loss": 2.0}])
    odd = [
        '{"step": 2, "loss": NaN, "eval/fve_nrm": Infinity}',
        '{"step": 2, "loss": 1' + "0" * 400 + "}",
        '{"step": 3, "loss": "high", "eval/fve_nrm": [1], "flag": true, "deep": {"a": 1}}',
        '{"step": true, "loss": 1}',
        '{"step": -1, "loss": 1}',
        '{"step": "4", "loss": 1}',
        '{"loss": 1}',
        "[1, 2]",
        "null",
        "",
        '{"step": 5, "loss": 1.5}',
        '{"step": 6, "lo',
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("\n".join(odd).encode() + b"\xff\xfe\n")
    samples = ['{"step": 1}', '{"step": 1, "explanation": 5}', '{"step": 2, "explanation": "fine", "cosine": "x"}', "{"]
    (run / "samples.jsonl").write_text("\n".join(samples))
    stage = read_stage(run)
    assert stage.series["loss"][1] == 2.0 and stage.series["loss"][5] == 1.5 and np.isnan(stage.series["loss"][2])
    assert stage.steps == 5 and "flag" not in stage.series and "deep" not in stage.series
    text = report_page(run)
    Page(text)
    assert "fine" in text


def test_a_run_of_nothing_but_nulls_has_no_charts(tmp_path):
    run = written(tmp_path / "av", [{"step": s, "loss": None, "eval/fve_nrm": None, "skipped": None} for s in (0, 1)])
    text = report_page(run)
    assert "<figure" not in text and "–" in text


# -- charts -----------------------------------------------------------------------------------------------------------


def points(n: int, value=lambda step: float(step)) -> list[tuple[int, float]]:
    return [(step, value(step)) for step in range(n)]


@pytest.mark.parametrize(
    "series",
    [
        points(1),
        points(5, lambda s: 0.0),
        points(5, lambda s: -1.0),
        points(5, lambda s: [np.nan, 1.0][s % 2]),
        points(3, lambda s: 1e30 * s),
        points(3, lambda s: 1e-30),
        [(10**9, 1.0), (10**9 + 1, 2.0)],
        points(1000, lambda s: np.nan if s % 3 else float(s)),
    ],
)
@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.filterwarnings("error")
def test_any_series_gives_an_element_in_the_colours_of_the_page(series, log_x, log_y):
    svg = draw(Chart("a", "b & <c>", (line("x", series), line("y", series, "--")), log_x=log_x, log_y=log_y), "f")
    root = xml.dom.minidom.parseString(svg).documentElement
    assert root.tagName == "svg" and "var(--c0)" in svg and "b &amp; &lt;c&gt;" in svg
    assert not re.search(r"#[0-9a-f]{6}|<style|<metadata|\bnan\b|\binf\b", svg)


def test_steps_stand_where_they_belong_on_a_logarithmic_axis():
    svg = draw(Chart("a", "b", (line("x", [(0, 0.0), (10, 1.0), (100, 2.0), (1000, 3.0)]),), log_x=True), "f")
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--c0\); stroke-width: 1.6', svg)
    x = [float(pair.split()[0]) for pair in re.split(r"[ML] ?", path)[1:]]
    assert x[3] - x[2] == pytest.approx(x[2] - x[1], abs=0.2) and x[0] < x[1]
    assert re.findall(r">(\d+)</text>", svg)[:4] == ["0", "10", "30", "100"]


def test_long_series_keep_their_peaks():
    quiet = points(20_000, lambda step: 1.0)
    quiet[7777] = (7777, 50.0)
    svg = draw(Chart("a", "b", (line("x", quiet),)), "f")
    assert len(svg) < 60_000 and "fill-opacity: 0.18" in svg
    ticks = [float(tick) for tick in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", svg)]
    assert max(ticks) >= 40
