"""The errors users can catch; they live beside the models so that every layer can raise them."""

from nla_jax.models.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    InputError,
    NLAError,
    PromptError,
    SidecarError,
    StoreError,
    TeacherError,
    TokenizerError,
    VectorError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "HubError",
    "InputError",
    "NLAError",
    "PromptError",
    "SidecarError",
    "StoreError",
    "TeacherError",
    "TokenizerError",
    "VectorError",
]
