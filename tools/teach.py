"""`nla teach`: warm-start explanations for the rows of a store, written by a model or by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError, TeacherError
from nla_jax.tools.options import FILE, note, options, progress

if TYPE_CHECKING:
    from nla_jax.providers import Provider
    from nla_jax.teacher import Estimate, Lesson
    from nla_jax.teacher_asking import Asking
    from nla_jax.teacher_prompt import Instruction


def _positive(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise InputError(str(param.opts[0]), expected="a number above 0", got=value)
    return value


def _not_negative(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise InputError(str(param.opts[0]), expected="0 or more", got=value)
    return value


_COUNT = click.IntRange(min=1)

_WHAT = options(
    click.option(
        "--rows",
        "rows_spec",
        metavar="SPLITS",
        help="Rows of these splits (held_out: in none), or all. Default: av_sft,ar_sft.",
    ),
    click.option("--limit", type=_COUNT, metavar="N", help="The first N of those rows."),
    click.option("--instruction", type=FILE, metavar="FILE", help="Instead of our own; the text goes where {text} is."),
    click.option("--context-chars", type=_COUNT, default=4000, show_default=True, help="Of a prefix, the last ones."),
    click.option("--max-words", type=_COUNT, default=150, show_default=True, help="Longer explanations are dropped."),
    click.option("--retry-dropped", is_flag=True, help="Ask once more where an answer was dropped."),
    click.option("--replace", is_flag=True, help="Discard the explanations that another teacher wrote into STORE."),
)
_WHOM = options(
    click.option("--base-url", metavar="URL", help="Of a server that speaks the provider's API."),
    click.option(
        "--key-env", metavar="NAME", help="Variable with the key. Default: OPENAI_API_KEY, ANTHROPIC_API_KEY."
    ),
    click.option("--max-tokens", type=_COUNT, default=400, show_default=True, help="Length cap of a reply."),
    click.option("--temperature", type=float, callback=_not_negative, help="Default: the provider's own."),
)
_HOW = options(
    click.option("--answers", type=FILE, metavar="DIR", help="Where answers are kept. Default: answers, beside STORE."),
    click.option("--concurrency", type=_COUNT, default=16, show_default=True, help="Requests in flight at a time."),
    click.option("--rpm", type=float, callback=_positive, metavar="N", help="Requests a minute, at most."),
    click.option("--tpm", type=float, callback=_positive, metavar="N", help="Tokens a minute, at most (estimated)."),
    click.option(
        "--timeout", type=float, default=120.0, show_default=True, callback=_positive, help="Seconds a reply."
    ),
    click.option("--retries", type=click.IntRange(min=0), default=8, show_default=True, help="Of a failed request."),
    click.option(
        "--backoff", type=float, default=1.0, show_default=True, callback=_positive, help="First wait, doubling."
    ),
    click.option("--batch", is_flag=True, help="By the provider's batch API (anthropic): cheaper, within a day."),
    click.option(
        "--batch-size", type=click.IntRange(1, 100_000), default=10_000, show_default=True, help="Prompts each."
    ),
    click.option(
        "--poll", type=float, default=30.0, show_default=True, callback=_positive, help="Seconds between looks."
    ),
)
_COST = options(
    click.option("--dry-run", is_flag=True, help="Show rows, prompts, tokens and cost; ask and write nothing."),
    click.option("--tokenizer", type=FILE, metavar="DIR", help="Count tokens with it instead of characters / 4."),
    click.option("--price-in", type=float, callback=_not_negative, metavar="P", help="Per million input tokens."),
    click.option("--price-out", type=float, callback=_not_negative, metavar="P", help="Per million output tokens."),
)


@click.command(
    epilog="\b\nExamples:\n"
    "  nla teach out/store lexical\n"
    "  nla teach out/store openai:gpt-4.1-mini --dry-run --price-in 0.4 --price-out 1.6\n"
    "  nla teach out/store openai:qwen2.5-7b --base-url http://127.0.0.1:8000/v1\n"
    "  nla teach out/store anthropic:claude-haiku-4-5 --batch\n"
    "  nla teach out/store file:notes.jsonl"
)
@click.argument("store_path", metavar="STORE")
@click.argument("teacher", metavar="TEACHER")
@_WHAT
@_WHOM
@_HOW
@_COST
def teach(
    store_path: str,
    teacher: str,
    rows_spec: str | None,
    limit: int | None,
    instruction: Path | None,
    context_chars: int,
    max_words: int,
    retry_dropped: bool,
    replace: bool,
    base_url: str | None,
    key_env: str | None,
    max_tokens: int,
    temperature: float | None,
    answers: Path | None,
    concurrency: int,
    rpm: float | None,
    tpm: float | None,
    timeout: float,
    retries: int,
    backoff: float,
    batch: bool,
    batch_size: int,
    poll: float,
    dry_run: bool,
    tokenizer: Path | None,
    price_in: float | None,
    price_out: float | None,
) -> None:
    """Write an explanation of 2 or 3 features for each row of STORE, from its text prefix alone.

    TEACHER is openai:MODEL (any server with OpenAI's chat API, see --base-url), anthropic:MODEL, lexical, which needs
    no model, or file:PATH: your own explanations, JSONL or parquet with doc_id, position and explanation. Every answer
    is on disk before the next step, so a run that ends early goes on where it stopped, and a prompt that was answered
    once is not asked again, by whatever run uses the same --answers.

    Keys come from the environment. Without --price-in and --price-out no cost is shown.
    """
    from nla_jax.endpoint import Limits
    from nla_jax.providers import LEXICAL, open_provider
    from nla_jax.store import Store
    from nla_jax.teacher import check_teacher, choose_rows, teacher_meta, write_lesson
    from nla_jax.teacher_asking import Asking
    from nla_jax.teacher_file import file_meta, file_of
    from nla_jax.teacher_prompt import load_instruction

    limits = Limits(timeout, retries, backoff, rpm, tpm)
    asking = Asking(context_chars, max_words, concurrency, retry_dropped, batch, batch_size, poll, limits)
    provider = words = None
    own = file_of(teacher)
    if teacher != LEXICAL and own is None:
        words = load_instruction(instruction)
        provider = open_provider(
            teacher,
            base_url=base_url,
            key_env=key_env,
            max_tokens=max_tokens,
            temperature=temperature,
            need_key=not dry_run,
        )
        if batch and provider.name != "anthropic":
            raise InputError("--batch", expected="anthropic:MODEL", got=teacher)
    elif batch or base_url or instruction:
        raise InputError("--batch, --base-url and --instruction", expected="a teacher that is asked", got=teacher)
    store = Store.open(store_path)
    rows = choose_rows(store, rows_spec, limit)
    meta = teacher_meta(provider, words, asking) if own is None else file_meta(own, max_words)
    if dry_run:
        _dry_run(
            store,
            rows,
            provider,
            words,
            asking,
            _answers_dir(store_path, answers, provider),
            tokenizer,
            price_in,
            price_out,
        )
        return
    check_teacher(store, meta, replace)
    lesson = _learn(store, rows, provider, words, asking, _answers_dir(store_path, answers, provider), own)
    if not lesson.ok:
        fix = "--limit 3 and another model" if own is None else "--rows all"
        raise TeacherError(f"none of {len(rows):,} rows got an explanation ({_reasons(lesson)})", fix=fix)
    write_lesson(store, lesson, meta, replace)
    click.echo(f"wrote {lesson.ok:,} explanations of {len(rows):,} rows into {store_path}")
    _summary(lesson, provider, price_in, price_out)


def _answers_dir(store_path: str, answers: Path | None, provider: Provider | None) -> Path:
    if answers is not None or provider is None:
        return answers or Path()
    if "://" in store_path:
        raise InputError("--answers", expected="a local directory", got="none, with a store that is not local")
    return Path(store_path).expanduser().resolve().parent / "answers"


def _learn(
    store: Any,
    rows: Any,
    provider: Provider | None,
    words: Instruction | None,
    asking: Asking,
    directory: Path,
    own: Path | None,
) -> Lesson:
    from nla_jax.answers import Answers
    from nla_jax.teacher import teach as ask
    from nla_jax.teacher import teach_lexical
    from nla_jax.teacher_file import teach_file

    if own is not None:
        return teach_file(store, rows, own, max_words=asking.max_words, progress=progress())
    if provider is None or words is None:
        return teach_lexical(store, rows, progress=progress())
    with Answers(directory) as answers:
        return ask(store, rows, provider, words, asking, answers, note=note, progress=progress())


def _dry_run(
    store: Any,
    rows: Any,
    provider: Provider | None,
    words: Instruction | None,
    asking: Asking,
    directory: Path,
    tokenizer: Path | None,
    price_in: float | None,
    price_out: float | None,
) -> None:
    if provider is None or words is None:
        click.echo(f"{len(rows):,} rows; this teacher asks nobody and costs nothing")
        return
    from nla_jax.answers import Answers
    from nla_jax.teacher import estimate

    known = Answers.existing(directory)
    try:
        count = _counter(tokenizer)
        result = estimate(store, rows, provider, words, asking, known, count, progress=progress())
    finally:
        if known is not None:
            known.close()
    how = f"counted by {tokenizer}" if tokenizer else "characters / 4"
    click.echo(f"rows            {result.rows:>12,}")
    click.echo(f"unique prompts  {result.unique:>12,}")
    click.echo(f"answered before {result.cached:>12,}  in {directory}")
    click.echo(f"to ask          {result.unique - result.cached:>12,}")
    click.echo(f"input tokens    {result.input_tokens:>12,}  {how}")
    click.echo(
        f"output tokens   {result.output_tokens:>12,}  estimate, --max-tokens allows {_most(result, provider):,}"
    )
    _cost("cost", result.input_tokens, result.output_tokens, price_in, price_out)


def _most(result: Estimate, provider: Provider) -> int:
    """Output tokens if every reply ran into the cap."""
    return (result.unique - result.cached) * provider.max_tokens


def _counter(directory: Path | None) -> Callable[[str], int] | None:
    if directory is None:
        return None
    from nla_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(directory)
    return lambda text: len(tokenizer.encode(text))


def _cost(label: str, tokens_in: int, tokens_out: int, price_in: float | None, price_out: float | None) -> None:
    if price_in is not None and price_out is not None:
        amount = (tokens_in * price_in + tokens_out * price_out) / 1e6
        click.echo(f"{label:<15} {amount:>12,.2f}  at {price_in:g} and {price_out:g} per million tokens")
    else:
        click.echo(f"{label:<15} {'unknown':>12}  without --price-in and --price-out")


def _reasons(lesson: Lesson) -> str:
    from nla_jax.teacher_prompt import REASONS

    return "; ".join(f"{count:,} {reason} ({REASONS[reason]})" for reason, count in lesson.dropped.items()) or "none"


def _summary(lesson: Lesson, provider: Provider | None, price_in: float | None, price_out: float | None) -> None:
    click.echo(f"  dropped: {_reasons(lesson)}")
    if provider is None:
        return
    click.echo(
        f"  prompts: {lesson.unique:,} different, {lesson.reused:,} answered before, {lesson.asked:,} answers now"
    )
    if lesson.input_tokens or lesson.output_tokens:
        click.echo(f"  tokens of this run: {lesson.input_tokens:,} in, {lesson.output_tokens:,} out")
        if price_in is not None and price_out is not None:
            _cost("  cost", lesson.input_tokens, lesson.output_tokens, price_in, price_out)
    if lesson.other_endpoints:
        click.echo(f"  some answers kept from before came from {', '.join(lesson.other_endpoints)}")
    if lesson.dropped.get("no_answer"):
        note("some prompts got no answer; the same command asks them again")
