"""Typed errors. One line each: what is wrong, what was expected, what was got, and the next thing to try."""

from __future__ import annotations


class NLAError(Exception):
    """Base of every error a user can cause or repair.

    `str(error)` is one line: ``what: expected X, got Y. Try: fix``. The command line prints that line and exits
    with 2; a traceback appears only with ``--debug``.
    """

    def __init__(self, what: str, *, expected: object = None, got: object = None, fix: str | None = None):
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = []
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        line = what + (": " + ", ".join(parts) if parts else "")
        if fix:
            line += f". Try: {fix}"
        # A message must stay on one line whatever a file name or a token contains.
        super().__init__(" ".join(line.split()))


class ConfigError(NLAError):
    """config.json asks for something the models here do not compute, or lacks what they need."""


class CheckpointError(NLAError):
    """Weights are missing, unknown, misshapen, truncated or corrupt."""


class TokenizerError(NLAError):
    """Tokenizer files are missing, unreadable, or do not do what the sidecar says."""


class SidecarError(NLAError):
    """nla_meta.yaml is missing, malformed, or contradicts the live tokenizer or model."""


class PromptError(NLAError):
    """A template cannot be turned into a prompt with exactly one marker."""


class VectorError(NLAError):
    """Activation vectors have the wrong width, are zero, or are not finite."""


class InputError(NLAError):
    """The user's text, positions or flags cannot be used."""


class HubError(NLAError):
    """A model id could not be resolved to files on this machine."""


class StoreError(NLAError):
    """An activation store is missing, half-written, corrupt, or of another model."""


class TeacherError(NLAError):
    """A provider of warm-start explanations cannot be reached, refuses, or is not set up."""
