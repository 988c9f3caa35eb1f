"""The demo's numbers against plain loops over the same rows, and its page: whole, harmless, and asking for nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from scipy import stats

from nla_jax.errors import InputError
from nla_jax.manifest import StoreSpec
from nla_jax.store import Store
from nla_jax.store_splits import write_splits
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index
from nla_jax.tools import demo_measure, demo_rows
from nla_jax.tools.demo_measure import RESULTS_HEADER, bootstrap, cost, measure, results_row, results_table
from nla_jax.tools.demo_page import page, write_page
from nla_jax.tools.world import FACT_KINDS, Story, generate, last_word, read_facts, stated
from nla_jax.tools.world_words import VALUES

D, N, SEED, VARIANCE = 16, 60, 5, 0.8
STORIES = {f"story-{i}": story for i, story in enumerate(generate(N, SEED))}
HOSTILE = '<script>alert(1)</script> & "q" \' </style> \x00 {{title}}'


def vector(story: Story, turned: bool, rng: np.random.Generator) -> np.ndarray:
    """The name, and the setting: in `turned` stories another one's."""
    out = 0.01 * rng.normal(size=D)
    settings, names = VALUES["setting"], VALUES["name"]
    out[(settings.index(story.facts["setting"]) + turned) % len(settings)] += 1
    out[len(settings) + names.index(story.facts["name"])] += 1
    return out


def make_store(path: Path) -> Store:
    rng, splits = np.random.default_rng(0), np.arange(N) % 4 - 1  # every fourth is held out
    words = sorted({w.text for s in STORIES.values() for w in s.words})

    def documents():
        for name, story in STORIES.items():
            n = len(story.words)
            yield IndexedDocument(
                doc_id=name,
                text=story.text,
                ids=np.array([words.index(w.text) for w in story.words], np.int32),
                roles=np.zeros(n, np.int8),
                text_end=np.array([w.end for w in story.words], np.int32),
                positions=np.array([10, 25, n - 1]),
            )

    spec = StoreSpec(D, (1,), {"name": "m", "n_layers": 2}, {"fingerprint": "f"}, shard_rows=512)
    create_index(path, spec, documents())
    writer = ShardWriter(path)
    vectors = [vector(s, splits[i] == -1, rng) for i, s in enumerate(STORIES.values()) for _ in range(3)]
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, np.array(vectors[a:b], np.float32))
    writer.finish()
    write_splits(path, assignment=splits)
    return Store.open(path)


def explanation(story: Story, prefix: str, step: int, row: int) -> str:
    """True setting; a wrong name at first; the right quotation in every other row."""
    name = story.facts["name"] if step else VALUES["name"][VALUES["name"].index(story.facts["name"]) - 1]
    quoted = last_word(prefix) if row % 2 else "nowhere"
    more = f" {HOSTILE}" if row == 0 else ""
    return f'In {story.facts["setting"]}. About {name}. Last "{quoted}".{more}'


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rl(path: Path, store: Store, last: float) -> dict[int, np.ndarray]:
    """A run of 20 steps whose mean error falls from 0.5 to about `last`; returns the errors of each evaluation."""
    rng, table = np.random.default_rng(1), store.table()
    rows = np.flatnonzero(store.doc_splits[table["doc"]] < 0)
    names, prefixes = store.doc_ids(table["doc"][rows]), store.prefixes(rows)
    run = {"store": store.manifest["hash"], "variance_nrm": VARIANCE, "layer_index": 1, "settings": {"seed": 3}}
    run["settings"] |= {"samples": 8, "batch_size": 16, "transforms": [["shuffle", 0.5]]}
    metrics, samples, errors = [{"step": 0, "run": run}], [], {}
    for step in (0, 10, 20):
        errors[step] = rng.gamma(2, (0.5 - step / 20 * (0.5 - last)) / 2, len(rows))
        fve = 1 - errors[step].mean() / VARIANCE
        found = {"fve_nrm": fve, "fve_nrm_shuffle": 0.9 * fve, "fve_nrm_drop_quotes": 0.5 * fve, "fve_nrm_noise": None}
        found |= {"fve_nrm_greedy": 0.7 + step / 1000, "fve_calibrated": fve, "fve_shuffled_calibrated": -2e-4}
        metrics.append({"step": step} | {f"eval/{k}": v for k, v in found.items()} | {"eval/failed_share": 0.01})
        for i, row in enumerate(rows.tolist()):
            said = explanation(STORIES[names[i]], prefixes[i], step, row)
            one = {"row": row, "doc": int(table["doc"][row]), "context": prefixes[i], "explanation": said}
            samples.append({"step": step, **one, "failed": False, "cosine": 0.5, "mse_nrm": errors[step][i]})
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "samples.jsonl", samples)
    (path / "report.html").write_text("a report")
    return errors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    write_lines(out / "world/facts.jsonl", [{"id": name, **s.to_json()} for name, s in STORIES.items()])
    write_lines(out / "world/lm.jsonl", [{"text": "a"}] * 7)
    store = make_store(out / "store")
    errors = write_rl(out / "rl", store, last=0.1)
    write_rl(out / "frozen/rl", store, last=0.48)
    lm = {"settings": {"steps": 30, "model": {"num_hidden_layers": 4}}}
    write_lines(out / "lm/metrics.jsonl", [{"step": 0, "run": lm}, {"step": 30, "loss": 1.5, "eval/loss": 1.6}])
    (out / "commands.txt").write_text(f"nla train lm\nnla train rl {HOSTILE[:-12]}\nnla train lm\n")
    return out, store, errors, measure(out, seconds={"lm": 60.0, "rl": 120.0})


@pytest.fixture(scope="module")
def html(made) -> str:
    return page(made[0], made[3])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_rows(made):
    _, store, errors, results = made
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for side, step in (("before", 0), ("after", 20)):
        found = results[side]["fve_nrm"]
        assert found["value"] == pytest.approx(1 - np.mean(errors[step]) / VARIANCE, abs=1e-12)
        assert found["low"] < found["value"] < found["high"]
        assert results[side]["costs"] == {
            "shuffle": pytest.approx(10),
            "drop_quotes": pytest.approx(50),
            "noise": None,
        }
    difference = results["after"]["fve_nrm"]["value"] - results["before"]["fve_nrm"]["value"]
    assert results["gain"]["value"] == pytest.approx(difference, abs=1e-12)
    assert results["n"] == 45 and results["documents"] == 15 and results["seed"] == 3
    assert (store.doc_splits < 0).sum() == 15 and results["world"]["corpus_documents"] == 7
    assert abs(results["ar_only"]["gain"]["value"]) < 0.2 < results["gain"]["value"]
    assert results["commands"] == ["nla train lm", f"nla train rl {HOSTILE[:-12]}"]


def test_truth_is_of_the_rows_own_story(made):
    results = made[3]
    before, after = results["before"], results["after"]
    assert before["true"]["value"] == 0.5 and after["true"]["value"] == 1.0
    assert before["overall"]["true"] == 0.5 and after["overall"]["stated"] == 90
    assert before["facts"]["name"]["true"] == 0.0 and after["facts"]["name"]["true"] == 1.0
    assert after["facts"]["mood"]["said"] == 0.0 and after["facts"]["mood"]["true"] is None
    rows = [r for r in range(3 * N) if (r // 3) % 4 == 0]
    assert after["quote_last"] == pytest.approx(np.mean([r % 2 for r in rows if r]), abs=0.03)


def test_probes_train_on_the_training_sets_and_test_on_held_out_documents(made):
    probes = made[3]["probes"]
    # Held-out vectors hold another setting than their story's, in the same way everywhere: a probe that has seen none
    # of them is always wrong.
    assert probes["setting"]["accuracy"] == 0.0 and probes["name"]["accuracy"] == 1.0
    assert probes["name"]["n"] == 45 and probes["weather"]["accuracy"] < 0.6


def test_the_last_token_alone(made):
    _, store, _, results = made
    table, directions = store.table(), store.vectors(slice(0, store.n_rows)).astype(np.float64)
    directions *= np.sqrt(D) / np.linalg.norm(directions, axis=1, keepdims=True)
    split = store.doc_splits[table["doc"]]
    total = []
    for row in np.flatnonzero(split < 0):
        same = [v for v, t, s in zip(directions, table["token_id"], split, strict=True) if s >= 0]
        of_token = [
            v
            for v, t, s in zip(directions, table["token_id"], split, strict=True)
            if s >= 0 and t == table["token_id"][row]
        ]
        guess = np.mean(of_token or same, axis=0)
        cosine = guess @ directions[row] / np.linalg.norm(guess) / np.linalg.norm(directions[row])
        total.append(2 * (1 - cosine))
    assert results["last_token"] == pytest.approx(1 - np.mean(total) / VARIANCE, abs=1e-6)


def test_bootstrap_is_over_documents():
    rng = np.random.default_rng(0)
    docs = np.repeat(np.arange(80), 4)
    values = np.repeat(rng.normal(size=80), 4) + 0.1 * rng.normal(size=320)
    found = bootstrap(values, np.ones(320), docs)
    means = values.reshape(80, 4).mean(1)
    theirs = stats.bootstrap((means,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(theirs.low, abs=0.04)
    assert found["high"] == pytest.approx(theirs.high, abs=0.04)
    of_rows = bootstrap(values, np.ones(320), np.arange(320))
    assert of_rows["high"] - of_rows["low"] < 0.6 * (found["high"] - found["low"])
    assert found == bootstrap(values, np.ones(320), docs)
    assert bootstrap(np.zeros(3), np.zeros(3), np.arange(3))["value"] is None


def test_cost_is_a_share_of_what_there_is():
    assert cost(0.8, 0.6) == pytest.approx(25) and cost(0.5, -0.5) == pytest.approx(200)
    assert cost(0.01, 0.0) is None and cost(-1, -2) is None and cost(None, 0.1) is None and cost(0.5, None) is None


def test_marks_say_what_is_counted():
    story = next(iter(STORIES.values()))
    prefix, facts = story.text[: story.words[12].end], story.facts
    wrong = {kind: next(v for v in VALUES[kind] if v != facts[kind]) for kind in FACT_KINDS}
    text = (
        f"In {facts['setting']}. Feels {wrong['mood']}. \"{last_word(prefix)}\" “{facts['name']}” '{facts['goal']}' x"
    )
    pieces = demo_rows.marked(text, story, prefix)
    assert "".join(piece for piece, _ in pieces) == text
    said = [(piece, verdict) for piece, verdict in pieces if verdict]
    assert said[:2] == [(facts["setting"], "true"), (wrong["mood"], "false")]
    assert [verdict for _, verdict in said[2:]] == [
        "quote",
        "quote" if facts["name"] == last_word(prefix) else "misquote",
    ]
    assert sum(len(v) for v in stated(text).values()) == 2
    assert demo_rows.marked("", story, prefix) == []


def test_what_cannot_be_measured_is_refused(made, tmp_path):
    out, store, *_ = made
    for name in ("world", "store"):
        (tmp_path / name).symlink_to(out / name)
    with pytest.raises(InputError, match="no finished joint run"):
        measure(tmp_path)
    write_rl(tmp_path / "rl", store, last=0.2)
    assert measure(tmp_path)["ar_only"] is None
    lines = (tmp_path / "rl/metrics.jsonl").read_text()
    (tmp_path / "rl/metrics.jsonl").write_text(lines.replace(store.manifest["hash"], "0" * 64))
    with pytest.raises(InputError, match="another store"):
        measure(tmp_path)
    (tmp_path / "world").unlink()
    with pytest.raises(InputError, match="facts.jsonl is missing"):
        measure(tmp_path)
    assert len(read_facts(out / "world/facts.jsonl")) == N


def test_the_row_for_the_table(made):
    results = json.loads(json.dumps(made[3]))
    interval = {"value": 0.4541, "low": 0.43, "high": 0.48}
    results["before"] |= {"fve_nrm": interval, "true": {"value": 0.55, "low": 0.5, "high": 0.6}}
    results["after"] |= {"fve_nrm": interval | {"value": 0.7}, "shuffled_calibrated": -0.0002, "failed_share": 0.004}
    results["after"]["overall"]["chance"] = 0.16
    results |= {"gain": interval | {"value": 0.2459}, "ar_only": {"gain": interval | {"value": -0.0312}}}
    row = "| 3 | .454 ±.025 | .700 ±.025 | +.246 ±.025 | .000 | −.031 ±.025 | 0.4% | .55 → 1.00 (.16) "
    row += "| 10% → 10% | 50% → 50% | 3.0 |"
    assert results_row(results) == row
    assert results_table(results, results) == f"{RESULTS_HEADER}\n{row}\n{row}"
    widths = {line.count("|") for line in results_table(results).splitlines()}
    assert len(widths) == 1
    results |= {"ar_only": None, "seconds": {}}
    results["after"]["costs"] = dict.fromkeys(demo_measure.CHANGES)
    assert "| – | 0.4%" in results_row(results) and results_row(results).endswith("| 10% → – | 50% → – | – |")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_links_to_what_is_there(made, html):
    parsed = Page(html)
    assert "default-src 'none'" in html and not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert not re.search(r"//[a-z]|@import|@font-face|src=|data:", html)
    links = {v for k, v in parsed.attributes if k == "href" and v and v[0] != "#"}
    assert links == {"rl/report.html", "frozen/rl/report.html"}
    ids = [v for k, v in parsed.attributes if k == "id"]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert len(html) < 300_000
    path = write_page(made[0], made[3])
    assert path == made[0] / "index.html" and path.read_text(encoding="utf-8") == html
    assert not list(made[0].glob(".*.tmp"))


def test_no_text_becomes_markup(html):
    assert html.count("alert(1)") > 1 and "<script" not in html.lower()
    assert html.count("</style>") == 1 and "\x00" not in html
    assert "<script>alert(1)</script>" in Page(html).words


def test_the_page_shows_what_was_measured(made, html):
    results, words = made[3], Page(html).words
    for side in ("before", "after"):
        assert f"{results[side]['fve_nrm']['value']:.3f}" in words
    assert "45 vectors, 15 stories" in words and "no auxiliary loss" in words and "nla train lm" in words
    assert all(kind in words for kind in FACT_KINDS) and "logarithmic scale" in words and "only the AR trained" in words
    assert "calibrated" in words and "always the mean direction" in words and "costs 50%" in words
    # A sign beside each colour, and words for those who see neither.
    assert html.count('class="yes"') == html.count('<span role="img" aria-label="(true)">✓')
    assert html.count('class="no"') == html.count('<span role="img" aria-label="(false)">✗') > 1
    cards = re.findall(r"<article.*?</article>", html, re.DOTALL)
    assert len(cards) == len(results["examples"]) == 12
    for card, example in zip(cards, results["examples"], strict=True):
        assert Page(card).text.startswith(example["prefix"] + example["rest"])
        assert Page(re.findall(r"<mark>.*?</mark>", card)[0]).text == example["prefix"].split()[-1]


def test_the_page_of_a_short_run(made, tmp_path):
    """No control run, no report, no times, no numbers of the target: what is not there is left out."""
    results = json.loads(json.dumps(made[3]))
    results |= {"ar_only": None, "seconds": {}, "stages": {}, "commands": [], "examples": [], "probes": {}}
    for side in ("before", "after"):
        results[side] |= {"greedy": None, "teacher": None, "quote_last": None}
    out = tmp_path / "short"
    out.mkdir()
    (out / "rl").symlink_to(made[0] / "rl")
    words = Page(page(out, results)).words
    assert "only the AR trained" not in words and "What the explanations say" not in words and "–" in words
    assert "nla train rl --config=demo" in words and "None" not in words and "nan" not in words
