"""A task small enough to train in milliseconds, for the tests of the loop; also a program: toy_task.py OUT STEPS ..."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

D = 8


class ToyLoader:
    """Batch i is a function of i. With `batches` it ends."""

    def __init__(self, seed: int, batches: int | None = None):
        self.seed, self.batches, self.next = seed, batches, 0

    def __next__(self) -> dict[str, np.ndarray]:
        if self.next == self.batches:
            raise StopIteration
        rng = np.random.default_rng([self.seed, self.next])
        x = rng.normal(size=(16, D)).astype(np.float32)
        self.next += 1
        return {"x": x, "y": x @ np.arange(D, dtype=np.float32), "number": np.int32(self.next - 1)}

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def restore(self, state: Any) -> None:
        self.next = state["next"]


class ToyTask:
    """Linear regression with adam. `nan_at`: steps whose loss is NaN; `skip_from`: steps from it on are skipped;
    `seen` records the batches, `evaluations` the steps evaluated at. `size` is that of an array that is dragged along.
    """

    name = "toy"
    best: tuple[str, str] | None = ("eval/loss", "min")

    def __init__(self, steps: int = 20, **options: Any):
        base = {"steps": steps, "log_every": 2, "eval_every": 5, "save_every": 5, "keep_last": 2, "seed": 3}
        fields = {**base, "optim": {"lr": 0.1}}
        extra = {"nan_at": (), "skip_from": 10**9, "size": 4, "delay": 0.0, "batches": None, "evals": {}}
        self.extra = SimpleNamespace(**{k: options.pop(k, v) for k, v in extra.items()})
        self.settings = SimpleNamespace(**{**fields, **options})
        self.optimizer = optax.adam(self.settings.optim["lr"])
        self.seen: list[int] = []
        self.evaluations: list[int] = []
        self.step_jit = jax.jit(self._step, donate_argnums=0)

    def init(self) -> Any:
        w = jax.random.normal(jax.random.key(self.settings.seed), (D,))
        big = jnp.zeros((self.extra.size, 64), jnp.bfloat16)
        return {"w": w, "opt": self.optimizer.init(w), "big": big, "list": (jnp.int32(0), None)}

    def loader(self) -> ToyLoader:
        return ToyLoader(self.settings.seed, self.extra.batches)

    def _step(self, state: Any, batch: Any, number: jax.Array) -> Any:
        def loss_of(w: jax.Array) -> jax.Array:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (16,))
            return jnp.mean((batch["x"] @ w - batch["y"] + 0.1 * noise) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(state["w"])
        updates, opt = self.optimizer.update(grads, state["opt"])
        count = state["list"][0] + 1
        new = {"w": state["w"] + updates, "opt": opt, "big": state["big"] + 1, "list": (count, None)}
        return new, {"loss": loss, "lr": jnp.float32(0.1)}

    def step(self, state: Any, batch: Any, number: int) -> Any:
        self.seen.append(int(batch["number"]))
        time.sleep(self.extra.delay)
        state, metrics = self.step_jit(state, batch, np.int32(number))
        if number in self.extra.nan_at:
            metrics["loss"] = jnp.float32(np.nan)
        metrics["skipped"] = float(number >= self.extra.skip_from)
        return state, metrics

    def evaluate(self, state: Any, number: int) -> Any:
        self.evaluations.append(number)
        loss = float(jnp.mean((state["w"] - jnp.arange(D)) ** 2))
        metrics = {"eval/loss": self.extra.evals.get(number, loss), "eval/fve_nrm": 1 - loss}
        return metrics, [{"text": f"sample of {number}"}]

    def export(self, state: Any, directory: Path) -> list[Path]:
        path = directory / "toy"
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "w.npy", np.asarray(state["w"]))
        return [path]

    def describe(self) -> dict[str, Any]:
        return {"settings": vars(self.settings), "data": "toy"}


def main() -> int:
    from nla_jax.errors import NLAError
    from nla_jax.train.loop import run

    try:
        result = run(ToyTask(**json.loads(sys.argv[2])), sys.argv[1], report=False)
    except NLAError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"step": result.step, "reason": result.reason}))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
