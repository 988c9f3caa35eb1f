"""What results rest on: hashes of the three models, the layer's names, versions."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

from nla_jax import __version__
from nla_jax.evals import hosts
from nla_jax.pair import NLA

_FACTS = (".json", ".yaml", ".yml", ".jinja", ".model", ".txt")  # configs, sidecars and tokenizers


def weights_hash(path: Path) -> str:
    """sha256 over names and contents of a model directory's weight files, in the order of their names.

    All of every file: a hash of samples would not see an edited row."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix not in (*_FACTS, ".md"))
    return _of(path, files)


def facts_hash(path: Path) -> str:
    """The same of its configs, sidecar and tokenizer files."""
    return _of(path, sorted(f for f in path.iterdir() if f.is_file() and f.suffix in _FACTS))


def _of(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file, found in zip(files, hosts.spread(_digest, files), strict=True):
        digest.update(f"{file.relative_to(path).as_posix()}\0{found}\n".encode())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def model_hashes(nla: NLA) -> dict[str, dict[str, str]]:
    """{"av": {"weights", "facts"}, ...} for the models that an NLA has. Of several processes each reads some of the
    files, and all call this."""
    roles = {name: getattr(nla, name) for name in ("av", "ar", "target")}
    return {
        name: {"weights": weights_hash(Path(role.path)), "facts": facts_hash(Path(role.path))}
        for name, role in roles.items()
        if role is not None
    }


def layer_aliases(layer: int) -> dict[str, str]:
    """One place by its other names: the output of block K in torch, TransformerLens and transformers."""
    return {
        "module": f"model.layers[{layer}]",
        "transformer_lens": f"blocks.{layer}.hook_resid_post",
        "hidden_states": f"hidden_states[{layer + 1}]",
    }


def versions() -> dict[str, str]:
    import jax
    import numpy
    import scipy

    return {
        "nla_jax": __version__,
        "jax": jax.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def computed_on(nla: NLA) -> dict[str, Any]:
    """The device and the dtype of the weights."""
    import jax

    from nla_jax.roles import default_dtype

    device = jax.devices()[0]
    kind = device.device_kind
    roles = [role for role in (nla.av, nla.ar, nla.target) if role is not None]
    dtypes = sorted({str(role.dtype or default_dtype(role.path)) for role in roles})
    return {
        "device": device.platform if kind.lower() == device.platform else f"{device.platform} ({kind})",
        "dtype": ", ".join(dtypes),
    }
