"""`nla demo`: from nothing to a miniature NLA, through the commands that a run on a pod uses.

Only the world is special (tools/world.py): its stories, their facts and the teacher's notes are made here. Everything
else is `nla train lm`, `extract`, `teach`, `build`, `train ar|av|rl` with configs/demo.py; an interrupted demo goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from nla_jax import __version__, host_memory
from nla_jax.errors import InputError, NLAError

LAYER = 2


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is made and trained; what is not named is as in configs/demo.py."""

    stories: int
    lm_documents: int
    steps: dict[str, int]
    frozen_steps: int  # of the control run in which the AV is frozen; 0 for none
    eval_every: int
    eval_rows: int


FULL = Size(9000, 12000, {"lm": 350, "ar": 250, "av": 450, "rl": 250}, 250, 50, 512)
QUICK = Size(3000, 6000, {"lm": 120, "ar": 80, "av": 120, "rl": 50}, 0, 25, 256)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo",
    show_default=True,
    help="A new directory, or that of a demo to go on with.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the world and all training."
)
@click.option("--quick", is_flag=True, help="A short run, about two minutes: shows every step, explains less.")
def demo(out: Path, seed: int, quick: bool) -> None:
    """Train a small language model and the NLA that explains it, from nothing, and write a page about both.

    Minutes on two cores, about two with --quick; no network. What it runs are the commands for real models, and
    it prints each of them. Killed, the same command goes on.

    \b
    Example:
      nla demo --out demo
    """
    host_memory.keep_freed_memory()
    size = QUICK if quick else FULL
    _claim(out, {"seed": seed, "quick": quick, "version": __version__})
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        begun = time.monotonic()
        work()
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begun

    timed("world", lambda: _write_world(out, seed, size))
    timed("lm", lambda: _train("lm", out, seed, size))
    timed("data", lambda: _make_sets(out, seed))
    for stage in ("ar", "av", "rl"):
        timed(stage, lambda stage=stage: _train(stage, out, seed, size))  # type: ignore[misc]
    if size.frozen_steps:
        timed("frozen", lambda: _train_frozen(out, seed, size))

    from nla_jax.tools.demo_measure import measure, results_table
    from nla_jax.tools.demo_page import write_page

    results = measure(out, seconds=_sum_seconds(out, seconds))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = write_page(out, results)
    click.echo(results_table(results))
    click.echo(
        f"\n{(time.monotonic() - started) / 60:.1f} minutes. The page is {page}: open it in a browser. To explain a "
        "text of your own from this world:\n"
        f'  nla explain "Anna lived in forests. Rain poured. Anna felt sad." --target {out}/lm/export/target '
        f"--av {out}/rl/export/av --ar {out}/rl/export/ar\n"
        "To measure the pair with every control (minutes):\n"
        f"  nla eval --target {out}/lm/export/target --av {out}/rl/export/av --ar {out}/rl/export/ar "
        f"--data {out}/store --min-position 16 --max-new-tokens 32 --out {out}/eval"
    )


def _claim(out: Path, what: dict[str, object]) -> None:
    """Marks `out` as this demo's; InputError where another is in it."""
    mark = out / "demo.json"
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if found != what:
            raise InputError(f"{out} holds a demo of other settings", expected=what, got=found, fix="another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no demo", fix="another --out")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(what) + "\n", encoding="utf-8")


def _sum_seconds(out: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Adds what earlier, interrupted runs of this demo took; a demo that was finished already keeps its times."""
    file = out / "seconds.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if (out / "results.json").is_file():
        return before
    total = {name: round(before.get(name, 0.0) + seconds.get(name, 0.0), 1) for name in {**before, **seconds}}
    file.write_text(json.dumps(total) + "\n", encoding="utf-8")
    return total


def _nla(out: Path, *arguments: object) -> None:
    """Prints an `nla` command, notes it in OUT/commands.txt, and runs it in this process, which saves its start."""
    from nla_jax.tools.cli import main

    words = [str(a) for a in arguments]
    line = "nla " + " ".join(words)
    click.secho(f"$ {line}", err=True, bold=True)
    with (out / "commands.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    code = main.main(words, "nla", standalone_mode=False)
    if isinstance(code, int) and code:
        raise click.exceptions.Exit(code)


def _write_world(out: Path, seed: int, size: Size) -> None:
    from nla_jax.sidecar import Sidecar, write_sidecar
    from nla_jax.tokenizer import Tokenizer
    from nla_jax.tools.world import write_world
    from nla_jax.tools.world_tokenizer import AR_TEMPLATE, AV_TEMPLATE, MARKER

    place, done = out / "world", out / "world" / "templates.yaml"
    if done.is_file():
        return
    click.echo(f"writing {size.stories} stories, and notes and stories to learn from, into {place}", err=True)
    write_world(place, seed, size.stories, size.lm_documents)
    tokenizer = Tokenizer.from_dir(place / "tokenizer")
    (marker_id,) = tokenizer.encode(MARKER)
    templates = Sidecar(
        kind="nla_dataset",
        role=None,
        d_model=64,
        layer_index=LAYER,
        injection_scale=None,
        mse_scale=math.sqrt(64),
        injection_mode="replace",
        marker=MARKER,
        marker_id=marker_id,
        left_id=tokenizer.encode("<concept>")[0],
        right_id=tokenizer.encode("</concept>")[0],
        ar_suffix_ids=None,
        av_template=AV_TEMPLATE,
        ar_template=AR_TEMPLATE,
    )
    write_sidecar(templates, done)


def _train(stage: str, out: Path, seed: int, size: Size) -> None:
    _nla(
        out,
        *("train", stage, "--config=demo", "--out", out, f"--config.seed={seed}"),
        *(f"--config.target={out}/lm/export/target", f"--config.store={out}/store"),
        *_world_files(out),
        f"--config.{stage}.steps={size.steps[stage]}",
        *([f"--config.rl.eval_every={size.eval_every}"] if stage == "rl" else []),
        f"--config.eval_rows={size.eval_rows}",
    )


def _train_frozen(out: Path, seed: int, size: Size) -> None:
    """The control: the AR is trained on what the warm-started AV writes, the AV stays as it is."""
    _nla(
        out,
        *("train", "rl", "--config=demo", "--out", out / "frozen", f"--config.seed={seed}"),
        *(f"--config.target={out}/lm/export/target", f"--config.store={out}/store"),
        *(f"--config.rl.av={out}/av/export/av", f"--config.rl.ar={out}/ar/export/ar"),
        *_world_files(out),
        *("--config.rl.train_av=false", f"--config.rl.steps={size.frozen_steps}", "--config.rl.eval_every=0"),
        f"--config.eval_rows={size.eval_rows}",
    )


def _world_files(out: Path) -> Sequence[str]:
    return f"--config.lm.corpus={out}/world/lm.jsonl", f"--config.lm.tokenizer={out}/world/tokenizer"


def _make_sets(out: Path, seed: int) -> None:
    """The store with the teacher's notes and the training sets; finished parts are not made again."""
    from nla_jax.build import open_build
    from nla_jax.store import Store
    from nla_jax.tools.world import write_notes

    store, target, notes = out / "store", out / "lm" / "export" / "target", out / "world" / "notes.jsonl"
    try:
        open_build(str(store))
        return
    except NLAError:
        pass
    _nla(
        out,
        *("extract", out / "world" / "stories.jsonl", "--target", target, "--layer", LAYER, "--out", store),
        *("--per-document", 8, "--min-position", 16, "--batch-tokens", 8192),
    )
    if not notes.is_file():
        partial = notes.with_suffix(".partial")
        write_notes(Store.open(store), out / "world" / "facts.jsonl", partial, seed)
        os.replace(partial, notes)
    _nla(out, "data", "split", store, "--fractions", "0.24,0.24,0.48", "--seed", seed)
    _nla(out, "teach", store, f"file:{notes}", "--rows", "av_sft,ar_sft,held_out")
    _nla(out, "build", store, "--target", target, "--template-from", out / "world" / "templates.yaml")
