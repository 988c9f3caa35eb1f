"""How the demo was made: the target's training, the stages with links to their reports, and the commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_jax.tools.demo_examples import number, percent, text

_STAGES = {  # directory: (what it is, what it is held to)
    "lm": ("The target: a language model from scratch", "held-out loss, nats per token"),
    "ar": ("AR warm start: from the teacher's notes to vectors", "FVE of the notes, held out"),
    "av": ("AV warm start: from vectors to the teacher's notes", "held-out loss, nats per token"),
    "rl": ("Joint RL: the AV is rewarded for what the AR gets back, the AR learns to get it", "sampled FVE, held out"),
}
_BY_HAND = (
    "nla train lm --config=demo",
    "nla extract demo/world/stories.jsonl --target demo/lm/export/target --layer 2 --out demo/store",
    "nla teach demo/store file:demo/world/notes.jsonl",
    "nla build demo/store --target demo/lm/export/target --template-from demo/world/templates.yaml",
    *(f"nla train {stage} --config=demo" for stage in ("ar", "av", "rl")),
)


def making(out: Path, results: Mapping[str, Any]) -> list[str]:
    """The section of the page."""
    commands = results["commands"] or _BY_HAND
    about = "These commands were run, in this order." if results["commands"] else "What it runs, in short."
    shown = "\n".join(f"$ {command}" for command in commands)
    return [
        '<h2 id="making">How it was made</h2>',
        f'<div class="lead">{_target(results)}{_pair(results)}</div>',
        _stages(out, results),
        f'<details open><summary>The commands</summary><p class="note">{text(about)} They are those for real models, '
        f'with the same store, loop and configs.</p><pre class="scroll">{text(shown)}</pre></details>',
    ]


def _target(results: Mapping[str, Any]) -> str:
    world, lm = results["world"], results["stages"].get("lm")
    model = (lm or {}).get("settings", {}).get("model", {})
    blocks = model.get("num_hidden_layers")
    size = f"{blocks} blocks of width {world['width']}" if blocks else f"of width {world['width']}"
    shares = world["corpus_shares"]
    documents = "" if world["corpus_documents"] is None else f"{world['corpus_documents']} documents: "
    steps = f" in {lm['steps']} steps" if lm else ""
    return (
        f"<p><b>The target</b> ({text(size)}) learnt by ordinary next-word prediction{text(steps)}, with no auxiliary "
        f"loss, on {text(documents)}stories ({percent(shares['story'])}), beginnings of stories followed by notes on "
        f"them ({percent(shares['reading'])}), and notes followed by how the story goes on "
        f"({percent(shares['retelling'])}). Its vectors were taken after block {text(world['layer'])}, counted from 0: "
        f"{text(world['activations'])} of them from {text(world['stories'])} other stories, "
        f"{text(world['held_out_documents'])} of which were set aside.</p>"
    )


def _pair(results: Mapping[str, Any]) -> str:
    settings = results["stages"].get("rl", {}).get("settings", {})
    said = []
    if settings.get("samples"):
        said.append(f"{settings['samples']} explanations of each of {settings['batch_size']} vectors in a step")
    names = {"shuffle": "shuffled clauses", "drop_quotes": "dropped quotes", "noise": "changed case and punctuation"}
    changes = [f"{names.get(n, n)} ({percent(p)})" for n, p in settings.get("transforms", ()) if p]
    if changes:
        said.append(f"before the AR read them in training, some had {' and '.join(changes)}")
    if settings.get("replay_ar"):
        said.append(f"{percent(settings['replay_ar'])} of the AR's batch were the teacher's notes")
    if settings.get("replay_av"):
        said.append(f"the AV kept learning from notes with weight {number(settings['replay_av'], 2)}")
    if settings.get("claim_penalty"):
        said.append(f"claims that the AR could do without cost up to {number(settings['claim_penalty'], 2)} of reward")
    return f"<p><b>Joint training</b>: {text('; '.join(said))}.</p>" if said else ""


def _stages(out: Path, results: Mapping[str, Any]) -> str:
    seconds = results["seconds"]
    rows = []
    for name, (what, held_to) in _STAGES.items():
        stage = results["stages"].get(name)
        if stage is not None:
            rows.append(_row(out, name, what, stage, held_to, seconds.get(name)))
    if results["ar_only"] is not None:
        alone = results["ar_only"]
        held = {"first": alone["before"]["value"], "last": alone["after"]["value"]}
        stage = {"steps": alone["steps"], "held_out": held}
        what = "Control: the same with the AV frozen"
        rows.append(_row(out, "frozen/rl", what, stage, "sampled FVE, held out", seconds.get("frozen")))
    total = sum(seconds.values())
    if total:
        time = f'<td class="n">{_time(total)}</td>'
        rows.append(f'<tr class="main"><th scope="row">all, with data</th><td></td><td></td>{time}<td></td></tr>')
    head = "".join(f'<th class="{kind}">{n}</th>' for n, kind in _COLUMNS)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


_COLUMNS = (("stage", ""), ("steps", "n"), ("first → last", "n"), ("time", "n"), ("report", ""))


def _row(out: Path, name: str, what: str, stage: Mapping[str, Any], held_to: str, seconds: float | None) -> str:
    held = stage["held_out"]
    result = "" if held is None else f"{number(held['first'])} → {number(held['last'])} <small>{text(held_to)}</small>"
    report = f"{name}/report.html"
    link = f'<a href="{report}">{report}</a>' if (out / report).is_file() else ""
    return (
        f'<tr><th scope="row" class="words">{text(what)}</th><td class="n">{text(stage["steps"])}</td>'
        f'<td class="n">{result}</td><td class="n">{_time(seconds)}</td><td>{link}</td></tr>'
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
