"""What kind of token an activation was read at: which explanations fail may hang on it."""

from __future__ import annotations

from nla_jax.evals.context import Context

START, INSIDE, NUMBER, MARKS, SPACE, OTHER = (
    "word start",
    "word continuation",
    "number",
    "punctuation",
    "white space",
    "other",
)
CLASSES = (START, INSIDE, NUMBER, MARKS, SPACE, OTHER)


def of(ctx: Context) -> list[str]:
    """One of `CLASSES` for each row; "" for all where their tokens or the tokenizer of these are not known."""
    data, tokenizer = ctx.data, ctx.tokenizer
    if data.tokens is None or tokenizer is None:
        return [""] * len(data)
    out = []
    for ids, position in zip(data.tokens, data.positions.tolist(), strict=True):
        before = tokenizer.token_str(int(ids[position - 1])) if position else ""
        out.append(token_class(tokenizer.token_str(int(ids[position])), before))
    return out


def token_class(token: str, before: str = "") -> str:
    """The class of a token that follows the token `before`.

    A token that begins within a word continues it, whatever it ends in; one of letters and digits is "other", as is
    one that is part of a character."""
    core = token.strip()
    if not core:
        return SPACE if token else OTHER
    if "\ufffd" in core:
        return OTHER
    letters = any(c.isalpha() for c in core)
    digits = any(c.isnumeric() for c in core)
    if letters and digits:
        return OTHER
    if digits:
        return NUMBER
    if not letters:
        return MARKS
    inside = token[:1] == core[:1] and before[-1:].isalpha()
    return INSIDE if inside else START
