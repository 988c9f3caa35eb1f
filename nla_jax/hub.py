"""Hub ids to local directories, and `load_model` for either.

Downloads go through huggingface_hub: its cache, its progress bars, its resume of dropped connections. Only what is
read here is fetched: config, safetensors, tokenizer and sidecar; never pickled weights, never code.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nla_jax.errors import HubError

if TYPE_CHECKING:
    from nla_jax.models.config import ModelConfig
    from nla_jax.models.params import Params

# What is fetched from a repository, all of it at the top level ...
WANTED = (
    "*.json",  # config, generation_config, weight index, tokenizer files
    "*.safetensors",
    "*.jinja",
    "tokenizer.model*",
    "merges.txt",
    "nla_meta.yaml",
    "LICENSE*",
)
# ... except: other folders, and a second copy of the weights in their publisher's own layout.
UNWANTED = ("*/*", "consolidated*.safetensors")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"\w[\w./-]*")


def resolve(path_or_hub_id: str | Path, *, role: str | None = None) -> Path:
    """A local directory for a path or a hub id `org/name` or `org/name@revision`, downloading what is not cached.

    An existing directory always wins. `role` ("av", "ar", "target") is named in errors. Raises HubError in one line
    with what to try."""
    given = str(path_or_hub_id)
    who = f"{role}: " if role else ""
    local = Path(given).expanduser()
    if given and local.is_dir():
        return local
    name, at, revision = given.partition("@")
    if given and local.exists():
        raise HubError(f"{who}{given} is a file", expected="a model directory or a hub id", fix="its directory")
    if not _ID.fullmatch(name) or (at and not _REVISION.fullmatch(revision)):
        raise HubError(
            f"{who}{given!r} is neither a directory here nor a hub id",
            expected="a path that exists, or org/name or org/name@revision",
            fix="check the spelling and the working directory",
        )
    path = _download(name, revision or None, who)
    if not any(path.glob("*.safetensors")):
        raise HubError(
            f"{who}{name} holds no .safetensors weights at its top level",
            fix="a repository that does; pickled weights are never opened",
        )
    return path


def _download(name: str, revision: str | None, who: str) -> Path:
    # Imported here: it takes a second, and a local directory needs none of it.
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    what = f"{who}{name}" + (f"@{revision}" if revision else "")
    again = "the same command again; finished files are kept"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
        )
    except hub.GatedRepoError:
        fix = "accept its licence on its page, then `hf auth login` or set HF_TOKEN"
        raise HubError(f"{what} is gated", fix=fix) from None
    except hub.RevisionNotFoundError:
        raise HubError(
            f"{name} has no revision {revision!r}", fix="a branch, tag or commit that its page lists"
        ) from None
    except hub.RepositoryNotFoundError:
        fix = "check the spelling; `hf auth login` or HF_TOKEN if it is private"
        raise HubError(
            f"{what} is neither a directory here nor a repository that you can see on the hub", fix=fix
        ) from None
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError) as error:
        cause = error if isinstance(error, hub.HfHubHTTPError) else error.__cause__
        if isinstance(cause, hub.HfHubHTTPError):
            status = cause.response.status_code
            if status in (401, 403):
                fix = "`hf auth login` or set HF_TOKEN, with access to this repository"
                raise HubError(f"{what}: access denied (HTTP {status})", fix=fix) from None
            raise HubError(f"{what}: the hub answered HTTP {status}", fix=again) from None
        reason = _reason(cause or error)
        fix = "check the connection (HF_ENDPOINT, HF_HUB_OFFLINE, proxy), or give a directory"
        raise HubError(
            f"{what} is not complete in the cache and the hub cannot be reached ({reason})", fix=fix
        ) from None
    except OSError as error:
        fix = "free space, or HF_HOME on another disk; " + again
        raise HubError(f"{what}: download failed ({_reason(error)})", fix=fix) from None
    except Exception as error:  # its HTTP client is not ours to name, and differs between versions
        raise HubError(f"{what}: download failed ({_reason(error)})", fix=again) from None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def load_model(path_or_hub_id: str | Path, dtype: str | None = "float32", **options: Any) -> tuple[ModelConfig, Params]:
    """Reads any supported causal language model from a directory or the hub: (config, parameters).

    `dtype` is "float32", "bfloat16" or "float16", or None for the stored one. The options are those of
    `models.hf.load_model`: `n_layers`, `head`, `shardings`. Raises an NLAError of one line."""
    from nla_jax.models import hf

    with progress_bar("reading") as progress:
        return hf.load_model(resolve(path_or_hub_id), dtype, progress=progress, **options)


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on stderr where that is a terminal; gives the callback (bytes done, bytes in all), or None."""
    if not sys.stderr.isatty():
        yield None
        return
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
