"""Results of an evaluation as `nla eval` writes them, made up, for the tests of what is written from them."""

from __future__ import annotations

from typing import Any

from nla_jax.evals.result import Row, SuiteResult

HOSTILE = "<script>alert(1)</script> | a\nb `c` *d* [e](http://f) </style> \x1b[31m {{title}}"
DENOMINATOR = "variance of v_n 0.69 (AR sidecar)"
WEIGHTS = {"av": "a" * 64, "ar": "b" * 64}


def suites() -> list[SuiteResult]:
    buckets = ["50-99", "100-199", "200+"]
    fve = SuiteResult(
        "fve",
        (
            Row("fve_nrm", 0.8781, 0.86, 0.896, n=1000, documents=200, denominator=DENOMINATOR),
            Row("fve_nrm", -0.354, n=1000, documents=200, control="constant floor", denominator=DENOMINATOR),
            Row("fve_nrm", -0.9, -0.95, -0.87, n=1000, documents=200, control="shuffled pairs", note="other documents"),
            Row("fve_calibrated", 0.88, 0.86, 0.9, n=1000, documents=200),
            Row("fve_calibrated", 0.00012, -0.001, 0.001, n=1000, documents=200, control="shuffled pairs"),
            Row("cosine", 0.961, 0.95, 0.97, n=1000, documents=200),
            *(Row("fve_nrm", 0.8, 0.7, 0.9, n=9, documents=3, group=f"position {b}") for b in buckets),
            Row("fve_nrm", 0.2, n=30, documents=1, group="masked", note="one document: no interval"),
            Row("fve_raw", None, n=0, note=HOSTILE),
        ),
        notes=("the data has no splits", HOSTILE),
        settings={"nearest": 20_000},
        series={
            "by position": {
                "title": "fve_nrm by position",
                "x": buckets,
                "y": [0.8, 0.8, None],
                "low": [0.7, 0.7, None],
                "high": [0.9, 0.9, None],
                "xlabel": "position",
                "ylabel": "fve_nrm",
            }
        },
    )
    curve = {"title": "Best of k", "x": [1, 2, 4, 8], "xlabel": "k", "ylabel": "fve_nrm"}
    best = SuiteResult(
        "best-of-k",
        (
            *(Row("fve_nrm_best", 0.6 + k / 100, 0.5, 0.8, n=9, documents=3, group=f"k = {k}") for k in (1, 2, 4, 8)),
            Row("mean_of_k", 0.6, control="mean of k", n=9, documents=3),
        ),
        series={
            "best": {**curve, "y": [0.6, 0.62, 0.64, 0.68], "low": [0.5] * 4, "high": [0.8] * 4},
            "mean of k": {**curve, "y": [0.6] * 4, "low": None, "high": None},
            "calibration": {"title": "Calibration", "x": [0.1, 0.9], "y": [0.2, 0.7], "xlabel": "a", "ylabel": "b"},
            "lengths differ": {"x": [1, 2], "y": [1]},
            "no number": {"x": [1], "y": [None]},
        },
    )
    return [fve, best]


def results(**changes: Any) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "format": "nla_jax.eval",
        "format_version": 1,
        "versions": {"nla_jax": "0.1.0", "jax": "0.10.2"},
        "command": ["nla", "eval", "--av", "runs/mine/rl/export/av"],
        "models": {
            "av": {"given": "runs/mine/rl/export/av", "path": "/x/av", "weights": WEIGHTS["av"], "facts": "f" * 64},
            "ar": {"given": "runs/mine/rl/export/ar", "path": "/x/ar", "weights": WEIGHTS["ar"]},
        },
        "device": "cpu",
        "dtype": "float32",
        "d_model": 64,
        "layer_index": 2,
        "layer_aliases": {"module": "model.layers[2]", "hidden_states": "hidden_states[3]"},
        "fve_nrm_denominator": {"variance_nrm": 0.69, "source": "AR sidecar", "constant_predictor_floor": -0.354},
        "settings": {"seed": 42, "resamples": 2000, "suites": ["fve", "best-of-k"]},
        "data": {"path": "out/store", "kind": "store", "split": "held_out", "hash": "c" * 64, "rows_sha256": "d" * 64,
            "n": 1000,
                 "documents": 200},
        "suites": [suite.json() for suite in suites()],
        "skipped": [{"suite": "downstream", "reason": "it needs the target (--target)"}],
        **changes,
    }  # fmt: skip
