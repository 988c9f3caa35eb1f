"""HTTP to a provider that may be slow, busy or broken: limits, time-outs, and requests repeated with care.

What may help is tried again, with exponential back-off and jitter, or after as long as the provider asks for: 408,
409, 425, 429, 5xx, time-outs, broken connections, bodies that are not what they should be. Everything else (a wrong
key, an unknown model, a malformed request) ends the run at once with one line. Keys appear in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from nla_jax.errors import InputError, TeacherError

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_BUSY = {429, 503, 529}  # the provider says "later": waiting for it is no failure
_LONGEST_WAIT = 3600.0
_BUSY_TRIES = 50


class MalformedError(Exception):
    """A reply that is not what the provider's API promises; the request is repeated."""


class UnansweredError(TeacherError):
    """A request that failed in passing ways until its retries were used up."""


class RefusedError(TeacherError):
    """A request that the provider rejects, which repeating will not change. `status` is HTTP's."""

    def __init__(self, status: int, what: str, **parts: Any):
        super().__init__(what, **parts)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How hard a provider is asked. Rates are per minute; `timeout` and `backoff` are seconds."""

    timeout: float = 120.0
    retries: int = 8
    backoff: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


def check_url(url: str) -> str:
    """A base URL without its final slash; InputError for one that is none, or that carries a password or a key."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("--base-url", expected="http://HOST[:PORT]/PATH or https://", got=repr(url))
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "--base-url", expected="no password and no query in it", fix="the key in an environment variable"
        )
    return url.rstrip("/")


def is_local(url: str) -> bool:
    """Whether a URL names this machine or a private network."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal")) or "." not in host


class _Pace:
    """Spreads a rate per minute evenly: each taker waits for the end of the time that those before it took."""

    def __init__(self, per_minute: float | None):
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def take(self, amount: float, now: float) -> float:
        """The time at which a request of this size may start."""
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_each
        return start


class Endpoint:
    """One provider's HTTP API under a base URL, used as an async context manager."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        limits: Limits,
        secret: str | None = None,
        key_env: str = "",
        note: Callable[[str], None] = lambda message: None,
        connections: int = 16,
    ):
        self.url = url
        self.stop = asyncio.Event()  # set: what is in flight may finish, nothing is repeated or waited for
        self._headers, self._limits, self._secret, self._key_env, self._note = headers, limits, secret, key_env, note
        self._connections = connections
        self._requests, self._tokens = _Pace(limits.requests_per_minute), _Pace(limits.tokens_per_minute)
        self._paused_until = 0.0

    async def __aenter__(self) -> Endpoint:
        import httpx2

        self._client = httpx2.AsyncClient(
            base_url=self.url + "/",
            headers={"User-Agent": "nla_jax", **self._headers},
            limits=httpx2.Limits(max_connections=self._connections, max_keepalive_connections=self._connections),
            trust_env=not is_local(self.url),  # a proxy for the outside has no business with a local server
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def send(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], T],
        *,
        body: Any = None,
        idempotency: str | None = None,
        tokens: float = 0.0,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> T:
        """`read` of the reply's body, which raises MalformedError for one that it cannot use.

        `idempotency` goes along as `Idempotency-Key`, the same at every repetition: a provider that honours it
        answers a repeated request without doing, or charging for, the work again. `tokens` counts against the rate.
        Raises RefusedError, or UnansweredError after `retries` repetitions.
        """
        import httpx2

        headers = {"Idempotency-Key": idempotency} if idempotency else {}
        content = None
        if body is not None:
            content = json.dumps(body, ensure_ascii=True).encode()
            headers["Content-Type"] = "application/json"
        seconds = timeout or self._limits.timeout
        failures = busy = 0
        while True:
            await self._turn(tokens)
            wait: float | None = None
            try:
                # The client's own time-outs are per read; a reply that trickles would never meet them.
                async with asyncio.timeout(seconds):
                    reply = await self._client.request(
                        method, path, content=content, headers=headers, timeout=httpx2.Timeout(seconds, connect=20.0)
                    )
                if 200 <= reply.status_code < 300:
                    return read(reply.content)
                failure = self._judge(reply)
                if reply.status_code in _BUSY:
                    wait = _retry_after(reply.headers.get("retry-after"))
            except (TimeoutError, httpx2.TimeoutException):
                failure = f"no reply within {seconds:g} s"
            except MalformedError as error:
                failure = str(error)
            except httpx2.HTTPError as error:
                failure = self._clean(f"{type(error).__name__} {error}".strip())
            failures, busy = (failures + 1, busy) if wait is None else (failures, busy + 1)
            if failures > (self._limits.retries if retries is None else retries) or busy > _BUSY_TRIES:
                raise UnansweredError(
                    f"{self.url}: no usable reply in {failures + busy} tries", got=f"at last: {failure}"
                )
            if self.stop.is_set():
                raise UnansweredError(f"{self.url}: stopped", got=failure)
            if wait is not None:
                # A limit is the account's, not the request's: everybody waits.
                self._pause(wait, failure)
            await self.back_off(failures if wait is None else 0)

    async def back_off(self, failures: int) -> None:
        """Waits after so many failures: doubling to a minute, half of it by chance, so that requests that failed
        together do not return together."""
        await self.sleep(min(60.0, self._limits.backoff * 2.0 ** max(failures - 1, 0)) * random.uniform(0.5, 1.0))

    def _pause(self, seconds: float, why: str) -> None:
        if seconds > _LONGEST_WAIT:
            raise TeacherError(
                f"{self.url} asks to wait {seconds:.0f} s ({why})",
                fix="the same command later: answers so far are kept",
            )
        until = time.monotonic() + seconds
        if seconds >= 5 and until > self._paused_until + 1:
            self._note(f"waiting {seconds:.0f} s, as {urlsplit(self.url).hostname} asks ({why})")
        self._paused_until = max(self._paused_until, until)

    async def _turn(self, tokens: float) -> None:
        now = time.monotonic()
        start = max(self._requests.take(1, now), self._tokens.take(tokens, now))
        while (wait := max(start, self._paused_until) - time.monotonic()) > 0:
            await self.sleep(wait)
            if self.stop.is_set():
                raise UnansweredError(f"{self.url}: stopped")

    async def sleep(self, seconds: float) -> None:
        """Until the time is over or `stop` is set."""
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass

    def _judge(self, reply: httpx2.Response) -> str:
        """What a reply that is no success says, when asking again may help; raises RefusedError when it will not."""
        status, said = reply.status_code, self._clean(_message(reply.content))
        failure = f"HTTP {status}" + (f": {said}" if said else "")
        if status in _RETRIED and not _out_of_money(reply.content):
            return failure
        what = f"{self.url} answered {failure}"
        if status in (401, 403):
            if self._secret is None:
                fix = f"setting {self._key_env} (no key was sent)"
            else:
                fix = f"setting {self._key_env} to a key that this provider accepts"
        elif status == 404:
            fix = "the model's name as the provider spells it, and a --base-url that ends as its API does (often /v1)"
        elif 300 <= status < 400:
            fix = f"--base-url {self._clean(reply.headers.get('location', 'as it redirects'))}"
        elif _out_of_money(reply.content):
            fix = "the account's balance, then the same command: answers so far are kept"
        else:
            fix = "the settings of this command (model, --max-tokens, --temperature, --context-chars)"
        raise RefusedError(status, what, fix=fix)

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        if self._secret:
            text = text.replace(self._secret, f"[{self._key_env}]")
        return text if len(text) <= 300 else text[:300] + " ..."


def parsed(content: bytes) -> Any:
    """A body as JSON; MalformedError for one that is cut or is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise MalformedError(f"a reply of {len(content)} bytes that is not JSON") from None


def _message(content: bytes) -> str:
    """What an error's body says: its message where it has one in a known place, else its beginning."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else content[:200].decode("utf-8", "replace")


def _out_of_money(content: bytes) -> bool:
    """OpenAI says 429 for an empty account too, where waiting does not help."""
    return b"insufficient_quota" in content


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
