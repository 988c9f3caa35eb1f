"""A provider on the loopback interface: both chat APIs and the batch API, faults on request, and strict accounts.

It honours `Idempotency-Key` as a provider may: a repeated request with a known key gets the answer that the first one
made, and is not billed again. What it billed, answered and saw is there for tests to read.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str | tuple[str, Any] | None


@dataclass
class Seen:
    """One request: when it came and was answered, what it asked, and how it ended."""

    at: float
    method: str
    path: str
    headers: dict[str, str]
    prompt: str | None
    fault: Fault = None
    status: int = 0
    sent_at: float | None = None  # when a good answer had been handed to the socket whole


@dataclass
class FakeBatch:
    id: str
    requests: list[dict]
    created: float
    counts: dict[str, int] = field(default_factory=dict)


def reply_text(prompt: str) -> str:
    """What the fake answers to a prompt: three features that depend on all of it."""
    code = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
    return f"A text of kind {code[:6]}.\n\nIts sentence {code[6:12]} is open.\n\nIt ends with {code[12:18]}."


class FakeLLM:
    """Context manager. `fault(seen)` says what goes wrong with a request (None: nothing):

    "hang", "reset", "truncated" (JSON cut, length right), "short" (body shorter than announced), "trickle" (ten bytes
    a second), "empty", "refusal", "length", "one" (a single feature), "other" (JSON of another form),
    ("status", code[, body]), ("wait", seconds) for 429 with Retry-After, ("date", seconds) for the same as a date,
    ("slow", seconds). "lost" on a batch takes the batch and breaks the connection."""

    def __init__(
        self,
        fault: Callable[[Seen], Fault] = lambda seen: None,
        *,
        latency: float = 0.0,
        reply: Callable[[str], str] = reply_text,
        key: str | None = None,
        batch_seconds: float = 0.1,
        batch_fault: Callable[[str], str | None] = lambda prompt: None,
        honours_idempotency: bool = True,
    ):
        self.fault, self.latency, self.reply, self.key = fault, latency, reply, key
        self.batch_seconds, self.batch_fault, self.honours = batch_seconds, batch_fault, honours_idempotency
        self.seen: list[Seen] = []
        self.billed: dict[str, set[str]] = defaultdict(set)  # prompt -> what it was billed under
        self.sent: dict[str, list[float]] = defaultdict(list)  # prompt -> when a good answer was sent whole
        self.asked_at: dict[str, list[float]] = defaultdict(list)
        self.batches: dict[str, FakeBatch] = {}
        self.most_in_flight = self._in_flight = 0
        self._by_key: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> FakeLLM:
        fake = self

        class Handler(_Handler):
            owner = fake

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def asked(self) -> list[Seen]:
        """Requests with a prompt in them."""
        return [seen for seen in self.seen if seen.prompt is not None]

    def batched(self) -> Counter[str]:
        """In how many batches each prompt is."""
        return Counter(r["params"]["messages"][0]["content"] for batch in self.batches.values() for r in batch.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed in the middle of a request are what this is for


class _Handler(BaseHTTPRequestHandler):
    owner: FakeLLM
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self._handle("GET", None)

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._handle("POST", body)

    def _handle(self, method: str, body: Any) -> None:
        fake = self.owner
        prompt = body["messages"][0]["content"] if body and "messages" in body else None
        seen = Seen(time.monotonic(), method, self.path, dict(self.headers), prompt)
        with fake._lock:
            fake.seen.append(seen)
            if prompt is not None:
                fake.asked_at[prompt].append(seen.at)
            fake._in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake._in_flight)
        try:
            if fake.latency:
                time.sleep(fake.latency)
            fault = seen.fault = fake.fault(seen)
            name, *more = fault if isinstance(fault, tuple) else (fault,)
            given = self.headers.get("x-api-key") or (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if fake.key is not None and given != fake.key:
                self._json(seen, 401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            elif name == "status":
                self._json(seen, more[0], more[1] if len(more) > 1 else {"error": {"message": f"status {more[0]}"}})
            elif name == "wait":
                self._json(seen, 429, {"error": {"message": "slow down"}}, {"Retry-After": f"{more[0]}"})
            elif name == "date":
                when = email.utils.formatdate(time.time() + more[0], usegmt=True)
                self._json(seen, 429, {"error": {"message": "slow down"}}, {"Retry-After": when})
            elif "/batches" in self.path:
                self._batches(seen, method, body, name)
            else:
                if name == "slow":
                    time.sleep(more[0])
                self._answer(seen, body, name)
        finally:
            with fake._lock:
                fake._in_flight -= 1

    # -- one prompt ---------------------------------------------------------------------------------------------------

    def _answer(self, seen: Seen, body: dict, fault: str | None) -> None:
        fake, prompt = self.owner, seen.prompt or ""
        if fault == "other":
            self._json(seen, 200, {"object": "something else"})
            return
        # From here on the work is done, and billed, whether or not its result arrives.
        name = self.headers.get("Idempotency-Key") or f"request {len(fake.seen)}"
        with fake._lock:
            known = fake._by_key.get(name) if fake.honours else None
            value = known or self._value(body, prompt, fault)
            fake._by_key[name] = value
            if known is None:
                fake.billed[prompt].add(name if fake.honours else f"request {id(seen)}")
        data = json.dumps(value).encode()
        if fault == "hang":
            fake._closing.wait(60)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault == "truncated":
            self._send(seen, 200, data[: len(data) // 2])
        elif fault == "trickle":
            self._send(seen, 200, b"", announced=len(data))
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif fault == "short":
            self._send(seen, 200, data[: len(data) // 2], announced=len(data))
            self._reset()
        else:
            self._send(seen, 200, data)
            if fault not in ("empty",):
                seen.sent_at = time.monotonic()
                with fake._lock:
                    fake.sent[prompt].append(seen.sent_at)

    def _value(self, body: dict, prompt: str, fault: str | None) -> dict:
        text = self.owner.reply(prompt)
        text = {"empty": "", "one": "Only one feature here.", "refusal": "I will not."}.get(fault or "", text)
        tokens_in, tokens_out = len(prompt) // 4, len(text) // 4
        if "/chat/completions" in self.path:
            message = {"role": "assistant", "content": text}
            if fault == "refusal":
                message = {"role": "assistant", "content": None, "refusal": text}  # type: ignore[dict-item]
            return {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "model": body["model"],
                "choices": [
                    {"index": 0, "message": message, "finish_reason": "length" if fault == "length" else "stop"}
                ],
                "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out},
            }
        why = {"length": "max_tokens", "refusal": "refusal"}.get(fault or "", "end_turn")
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": why,
            "usage": {"input_tokens": tokens_in, "output_tokens": tokens_out},
        }

    # -- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, seen: Seen, method: str, body: Any, fault: str | None) -> None:
        fake = self.owner
        path = self.path.partition("?")[0].rstrip("/")
        if method == "POST":
            with fake._lock:
                name = self.headers.get("Idempotency-Key")
                batch = fake._by_key.get(f"batch {name}") if fake.honours and name else None
                if batch is None:
                    batch = FakeBatch(f"msgbatch_{len(fake.batches):04}", body["requests"], time.monotonic())
                    fake.batches[batch.id] = batch
                    fake._by_key[f"batch {name}"] = batch
            if fault == "lost":
                self._reset()
            else:
                self._json(seen, 200, self._batch(batch))
        elif path.endswith("/batches"):
            query = dict(re.findall(r"(\w+)=([^&]*)", self.path.partition("?")[2]))
            listed = [self._batch(b) for b in reversed(fake.batches.values())]
            if "after_id" in query:
                ids = [b["id"] for b in listed]
                listed = listed[ids.index(query["after_id"]) + 1 :]
            limit = int(query.get("limit", 20))
            self._json(seen, 200, {"data": listed[:limit], "has_more": len(listed) > limit})
        else:
            name, _, rest = path.partition("/batches/")[2].partition("/")
            found = fake.batches.get(name)
            if found is None:
                self._json(seen, 404, {"error": {"message": "no such batch"}})
            elif not rest:
                self._json(seen, 200, self._batch(found))
            else:
                lines = "".join(json.dumps(self._result(r)) + "\n" for r in reversed(found.requests)).encode()
                self._send(seen, 200, lines[:-20] if fault == "truncated" else lines)

    def _batch(self, batch: FakeBatch) -> dict:
        n = len(batch.requests)
        ended = time.monotonic() - batch.created >= self.owner.batch_seconds
        counts = {
            "processing": 0 if ended else n,
            "succeeded": n if ended else 0,
            "errored": 0,
            "canceled": 0,
            "expired": 0,
        }
        status = "ended" if ended else "in_progress"
        return {"id": batch.id, "type": "message_batch", "processing_status": status, "request_counts": counts}

    def _result(self, request: dict) -> dict:
        prompt = request["params"]["messages"][0]["content"]
        fault = self.owner.batch_fault(prompt)
        if fault in ("errored", "expired", "canceled"):
            return {"custom_id": request["custom_id"], "result": {"type": fault}}
        message = self._value(request["params"], prompt, fault)
        return {"custom_id": request["custom_id"], "result": {"type": "succeeded", "message": message}}

    # -- the wire -----------------------------------------------------------------------------------------------------

    def _json(self, seen: Seen, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(seen, status, json.dumps(value).encode(), headers)

    def _send(
        self, seen: Seen, status: int, data: bytes, headers: dict[str, str] | None = None, announced: int | None = None
    ) -> None:
        seen.status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if announced is None else announced))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        """Ends the connection by a reset instead of an orderly close."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
