"""`nla eval`: the offline benchmark of a pair, every number with its interval and its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o
from nla_jax.tools.options import FILE, options
from nla_jax.tools.processes import PROCESSES, together

OUT = Path("eval")  # where results go unless --out says otherwise
_COUNT = click.IntRange(min=1)

_WHAT = options(
    click.option("--av", metavar=o.MODEL, required=True, help="The activation verbalizer."),
    click.option("--ar", metavar=o.MODEL, required=True, help="The activation reconstructor."),
    click.option("--target", metavar=o.MODEL, help="The explained model, for suites that run it."),
    click.option("--data", metavar="PATH", help="Activations: a store, or a .parquet set."),
    click.option(
        "--suite",
        "suites",
        metavar="NAMES",
        help="Of fve, downstream, retrieval, robustness, claims, agreement, best-of-k, steering. Default: all.",
    ),
    click.option("--out", type=FILE, metavar="DIR", help=f"Results and report. Default: {OUT}."),
    click.option("--beside", type=FILE, metavar="OUT", help="An earlier evaluation to show beside this one."),
)
_ROWS = options(
    click.option("--n", metavar="N", type=_COUNT, default=1000, show_default=True, help="Activations."),
    click.option(
        "--per-document", metavar="N", type=_COUNT, default=5, show_default=True, help="Activations of one document."
    ),
    click.option("--split", default="held_out", show_default=True, help="Of the store: held_out, av_sft, rl, all ..."),
    click.option(
        "--min-position",
        metavar="N",
        type=click.IntRange(min=0),
        default=50,
        show_default=True,
        help="Earlier ones are reported apart.",
    ),
    click.option(
        "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True, help="Of everything."
    ),
)
_SAMPLES = options(
    click.option(
        "--k", metavar="N", type=_COUNT, default=8, show_default=True, help="Samples in agreement and best-of-k."
    ),
    click.option("--max-new-tokens", metavar="N", type=_COUNT, default=150, show_default=True, help="Length cap."),
    click.option(
        "--temperature", type=float, default=1.0, show_default=True, callback=o.temperature, help="0: greedy."
    ),
    click.option("--resamples", metavar="N", type=_COUNT, default=2000, show_default=True, help="Of each bootstrap."),
)
_PROVIDER = options(
    click.option(
        "--teacher", metavar="PROVIDER", help="openai:MODEL or anthropic:MODEL: paraphrase and translate too."
    ),
    click.option("--base-url", metavar="URL", help="Of a server that speaks the provider's API."),
    click.option(
        "--key-env", metavar="NAME", help="Variable with the key. Default: OPENAI_API_KEY, ANTHROPIC_API_KEY."
    ),
    click.option("--answers", type=FILE, metavar="DIR", help="Where its answers are kept. Default: answers, in --out."),
    click.option("--languages", metavar="NAMES", default="French", show_default=True, help="To translate to."),
    click.option(
        "--concurrency", metavar="N", type=_COUNT, default=16, show_default=True, help="Requests in flight at a time."
    ),
    click.option("--rpm", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Requests a minute, at most."),
)
_REFERENCE = options(
    click.option("--like-reference", is_flag=True, help="One text instead: a line for each token, as a transcript."),
    click.option("--text", help="With --like-reference: the text."),
    click.option("--file", type=FILE, metavar="PATH", help="With --like-reference: a UTF-8 file."),
    click.option("--chat", type=FILE, metavar="PATH", help="With --like-reference: a chat in JSON."),
)
_SPLIT = options(
    click.option("--fsdp", type=_COUNT, default=1, show_default=True, help="Devices that each model is split over."),
    click.option(
        "--tensor", type=_COUNT, default=1, show_default=True, help="Devices that its heads and MLP are split over."
    ),
)


@click.command(
    epilog="\b\nExamples:\n"
    "  nla eval --av AV --ar AR --target T --data acts --out eval\n"
    "  nla eval --av AV --ar AR --data rl.parquet --suite fve,retrieval --n 200\n"
    "  nla eval --av rl/export/av --ar rl/export/ar --data acts --out after --beside before\n"
    '  nla eval --av AV --ar AR --target T --like-reference --text "The capital of France is Paris."'
)
@_WHAT
@_ROWS
@_SAMPLES
@_PROVIDER
@_REFERENCE
@o.COMPUTE
@_SPLIT
@PROCESSES
@click.pass_context
def eval(
    ctx: click.Context,
    /,
    av: str,
    ar: str,
    target: str | None,
    variance: float | None,
    like_reference: bool,
    **rest: Any,
) -> None:
    """Measure a pair on activations it was not trained on; write tables, data and a report.

    OUT gets results.json (with the hashes of weights and data, the denominator and where it came from, seed, versions
    and command line), results.md, report.html, and for each suite a parquet file from which every number can be
    computed again. Intervals are 95%, bootstrapped by document. Suites that lack something (the target, training rows,
    tokens) are listed as not done, unless --suite names them.

    The same command again goes on where it was stopped: a suite that is done with the same models, data and settings
    is not done again, nor is an explanation drawn twice.

    All devices take part. A model larger than one of them is split by --tensor, within a host, or by --fsdp, which
    gathers every block's weights as they are needed. Several hosts run the same command: on TPU pods, in Slurm and in
    Kubernetes they find each other. The first writes OUT; where one is lost the others end, with 75 or by SIGABRT
    (134): run it again on all.
    """
    o.check_variance(variance)
    if like_reference:
        _like_reference(av, ar, target, variance, **rest)
        return
    for name in ("text", "file", "chat"):
        if rest[name] is not None:
            raise InputError(f"--{name}", expected="--like-reference with it", got="none", fix="--data for suites")
    if rest["data"] is None:
        raise InputError("--data", expected="a store, or a .parquet set", got="none", fix="nla eval --help")
    _evaluate({"av": av, "ar": ar, "target": target}, variance, **rest)


def _evaluate(
    given: dict[str, str | None],
    variance: float | None,
    *,
    suites: str | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat: int,
    **settings: Any,
) -> None:
    names = suite_names(suites)
    with together(coordinator, num_processes, process_id, heartbeat):
        _together(given, variance, names, **settings)


def _together(
    given: dict[str, str | None],
    variance: float | None,
    names: list[str] | None,
    *,
    data: str,
    out: Path | None,
    beside: Path | None,
    n: int,
    per_document: int,
    split: str,
    min_position: int,
    seed: int,
    k: int,
    max_new_tokens: int,
    temperature: float,
    resamples: int,
    teacher: str | None,
    base_url: str | None,
    key_env: str | None,
    answers: Path | None,
    languages: str,
    concurrency: int,
    rpm: float | None,
    batch_size: int | None,
    dtype: str | None,
    low_memory: bool,
    fsdp: int,
    tensor: int,
    **_: Any,
) -> None:
    """What each of the processes does; the first of them writes and prints."""
    from nla_jax.evals import hosts, run
    from nla_jax.evals.context import Context
    from nla_jax.evals.dataset import open_data
    from nla_jax.models.sharding import MeshSettings
    from nla_jax.tools import eval_report

    note = hosts.noted(o.note)
    earlier = hosts.by_first(lambda: None if beside is None else eval_report.read_results(beside, "--beside"))
    out = OUT if out is None else out
    writer = _writer(teacher, base_url, key_env, answers or out / "answers", languages, concurrency, rpm)
    nla = _open(given, dtype, variance, low_memory)
    assert nla.av is not None and nla.ar is not None
    if hosts.first():
        o.setup_of("eval", nla, given, dtype, {})
    found = open_data(
        data,
        layer=nla.ar.layer_index,
        split=split,
        n=n,
        per_document=per_document,
        min_position=min_position,
        seed=seed,
        mse_scale=nla.ar.sidecar.mse_scale,
        special_ids=nla.av.tokenizer.special_ids,
    )
    context = Context(
        nla,
        found,
        out=out,
        seed=seed,
        resamples=resamples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        split=MeshSettings(fsdp=fsdp, tensor=tensor),
        progress=o.progress(),
        note=note,
    )
    if nla.variance_nrm is None:
        note(f"fve_nrm denominator {context.variance:.4g} ({context.variance_source})")
    arguments = getattr(click.get_current_context().find_root().obj, "arguments", ())
    settings: dict[str, dict[str, Any]] = {"agreement": {"k": k}, "best-of-k": {"k": k}}
    if writer is not None:
        settings["robustness"] = {"provider": writer}
    try:
        results = run.evaluate(context, names, out, settings, given=given, command=("nla", *arguments), note=note)
    except KeyboardInterrupt:
        note(f"what is done is kept in {out}; the same command goes on from there")
        raise
    if hosts.first():
        _show(results, earlier, out)


def _show(results: dict[str, Any], earlier: dict[str, Any] | None, out: Path) -> None:
    """Writes the report and prints the table."""
    from nla_jax.evals.run import RESULTS
    from nla_jax.tools import eval_report, outputs, tables
    from nla_jax.tools.eval_report_page import page

    count = len(results["suites"])
    what = f"{count} suite{'s' if count != 1 else ''}"
    outputs.write(out / "results.md", lambda p: _text(p, eval_report.markdown(results, earlier)), what)
    outputs.write(out / "report.html", lambda p: _text(p, page(results, earlier)), what)
    o.note(f"wrote {out / RESULTS}, and the data of each suite beside it")
    for table, lines in eval_report.tables(results, earlier):
        tables.show(table, [*lines, ""])
    for left in results["skipped"]:
        click.echo(f"{left['suite']}: not done, {left['reason']}")


def suite_names(text: str | None) -> list[str] | None:
    """The suites of a comma list, checked; None for all."""
    if text is None:
        return None
    from nla_jax.evals.run import SUITES

    names = [name for part in text.split(",") if (name := part.strip())]
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "none"
        raise InputError("--suite", expected=f"some of {', '.join(SUITES)}", got=got)
    return names


def _open(given: dict[str, str | None], dtype: str | None, variance: float | None, low_memory: bool) -> Any:
    return o.open_pair(
        av=given["av"],
        ar=given["ar"],
        target=given["target"],
        dtype=dtype,
        variance=variance,
        low_memory=low_memory,
    )


def _writer(
    teacher: str | None,
    base_url: str | None,
    key_env: str | None,
    answers: Path,
    languages: str,
    concurrency: int,
    rpm: float | None,
) -> Any:
    """Who paraphrases and translates for the robustness suite; None where no provider was named."""
    if teacher is None:
        if base_url or key_env:
            raise InputError("--base-url and --key-env", expected="--teacher with them", got="none")
        return None
    from nla_jax.endpoint import Limits
    from nla_jax.evals.robustness import Rewriter
    from nla_jax.providers import open_provider
    from nla_jax.teacher_asking import Asking

    names = tuple(name for part in languages.split(",") if (name := part.strip()))
    if not names:
        raise InputError("--languages", expected="English names such as French,German", got=repr(languages))
    provider = open_provider(teacher, base_url=base_url, key_env=key_env)
    asking = Asking(concurrency=concurrency, limits=Limits(requests_per_minute=rpm))
    return Rewriter(provider, answers, names, asking, o.note)


def _text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "replace"))


def _like_reference(
    av: str,
    ar: str,
    target: str | None,
    variance: float | None,
    *,
    text: str | None,
    file: Path | None,
    chat: Path | None,
    data: str | None,
    suites: str | None,
    out: Path | None,
    max_new_tokens: int,
    batch_size: int | None,
    dtype: str | None,
    low_memory: bool,
    fsdp: int,
    tensor: int,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **_: Any,
) -> None:
    """Explains one text token by token and shows the reference's columns."""
    from nla_jax.tools import eval_reference as reference
    from nla_jax.tools import outputs, tables
    from nla_jax.tools.inputs import read_source

    if fsdp * tensor > 1 or (coordinator, num_processes, process_id) != (None, None, None):
        raise InputError("--like-reference", expected="one process, and models whole on one device", got="several")
    for name, value in (("--data", data), ("--suite", suites)):
        if value is not None:
            raise InputError("--like-reference", expected="one text", got=name, fix=f"leaving {name} out")
    if target is None:
        raise InputError("--like-reference", expected="the model that reads the text", got="none", fix="--target")
    texts = [name for name, value in (("--text", text), ("--file", file), ("--chat", chat)) if value is not None]
    if len(texts) != 1:
        raise InputError(
            "--like-reference", expected="one of --text, --file, --chat", got=" and ".join(texts) or "none"
        )
    source = read_source(text, file, chat)
    given: dict[str, str | None] = {"target": target, "av": av, "ar": ar}
    nla = _open(given, dtype, variance, low_memory)
    settings = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "dtype": dtype}
    setup = o.setup_of("eval", nla, given, dtype, settings)
    places = reference.explain_all(
        nla, source, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=o.progress()
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        what = f"{len(places.parts)} tokens"
        as_json = {**outputs.setup_json(setup), "format": "nla_jax.eval.transcript", **reference.as_json(places)}
        outputs.write(out / "transcript.txt", lambda p: _text(p, reference.transcript(places)), what)
        outputs.write(out / "transcript.json", lambda p: outputs.write_json(p, as_json), what)
    tables.show(reference.table(places), [*reference.summary(places), tables.denominator_line(setup)])
