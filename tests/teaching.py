"""What the tests of teachers share; run as a program it is a teaching run in a process of its own, to be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fake_llm import FakeLLM, reply_text

from nla_jax.answers import Answers
from nla_jax.endpoint import Limits
from nla_jax.providers import open_provider
from nla_jax.teacher import teach
from nla_jax.teacher_asking import Asking
from nla_jax.teacher_prompt import build_prompt, load_instruction

KEY = "sk-secret-0123456789abcdef"
QUICK = Limits(timeout=0.6, retries=6, backoff=0.02)
TEXTS = [f"The keeper counted {n} ships and then the" for n in range(24)]
APIS = ["openai", "anthropic"]


class Texts:
    """Rows whose prefixes are given."""

    splits = None
    has_explanations = False

    def __init__(self, texts: list[str]):
        self.texts, self.n_rows = texts, len(texts)

    def prefixes(self, rows: np.ndarray) -> list[str]:
        return [self.texts[i] for i in rows]


def provider_of(fake: FakeLLM, api: str = "openai", model: str = "m", **extra):
    url = fake.url + ("/v1" if api == "openai" else "")
    return open_provider(f"{api}:{model}", base_url=url, environ={}, **extra)


def run(fake: FakeLLM, directory: Path, texts=TEXTS, api="openai", limits=QUICK, provider=None, notes=None, **asking):
    store = Texts(list(texts))
    provider = provider or provider_of(fake, api)
    with Answers(directory) as answers:
        return teach(
            store,
            np.arange(store.n_rows),
            provider,
            load_instruction(),
            Asking(limits=limits, **asking),
            answers,
            note=(notes if notes is not None else []).append,
        )


def expected(texts) -> list[str]:
    return [reply_text(build_prompt(load_instruction(), text)) for text in texts]


def billed_once(fake: FakeLLM) -> bool:
    return all(len(names) == 1 for names in fake.billed.values())


def job_of(tmp_path: Path, texts, name: str = "", teacher="openai:m", limits=None, **asking) -> dict:
    return {
        "teacher": teacher,
        "texts": list(texts),
        "answers": str(tmp_path / "answers"),
        "out": str(tmp_path / f"out{name}.json"),
        "path": str(tmp_path / f"job{name}.json"),
        "asking": asking,
        "limits": limits or {"timeout": 1.0, "backoff": 0.02},
    }


def start(job: dict, fake: FakeLLM) -> subprocess.Popen:
    job["url"] = fake.url + ("/v1" if job["teacher"].startswith("openai") else "")
    Path(job["path"]).write_text(json.dumps(job))
    environ = {**os.environ, "OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
    return subprocess.Popen([sys.executable, __file__, job["path"]], env=environ, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def main(job_path: Path) -> None:
    job = json.loads(job_path.read_text())
    asking = Asking(**job.get("asking", {}), limits=Limits(**job.get("limits", {})))
    provider = open_provider(job["teacher"], base_url=job["url"])
    store = Texts(job["texts"])
    with Answers(job["answers"]) as answers:
        lesson = teach(store, np.arange(store.n_rows), provider, load_instruction(), asking, answers)
    out = Path(job["out"])
    part = out.with_suffix(".part")
    part.write_text(json.dumps({"texts": lesson.texts, "reasons": lesson.reasons}))
    os.replace(part, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
