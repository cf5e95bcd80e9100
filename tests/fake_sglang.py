"""A small HTTP server that answers as SGLang's does, in a thread, and can be told to misbehave."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine_lib.value_check import known_traces

INFO = {"model_path": "the-model", "architectures": ["Qwen2ForCausalLM"]}
SERVER_INFO = {"max_req_input_len": 2042, "max_total_num_tokens": 8192, "version": "0.5.23"}


def block(prompt_ids: list[int], limit: int) -> list[int]:
    """What the fake model writes: a function of the prompt."""
    return [(sum(prompt_ids) + 7 * i) % 250 for i in range(limit)]


def generated(body: dict) -> dict:
    params = body["sampling_params"]
    drawn = [params["custom_params"]["seed"]] if "custom_logit_processor" in body else []
    tokens = block(body["input_ids"] + drawn, params["max_new_tokens"])
    meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(body["input_ids"]), "cached_tokens": 1}
    return {"output_ids": tokens, "meta_info": meta}


class FakeServer:
    """`script(body) -> (status, body) | None` may answer in the place of the model; it runs in a thread of its own, and
    may wait. `pages` is the status of all that it tells of itself, `bodies` are the requests that came, `aborted` the ids
    of aborted ones."""

    def __init__(self, script=lambda body: None, port: int = 0, pages: int = 200, seconds: float = 0.0, **info):
        self.script, self.info, self.pages = script, info, pages
        self.bodies, self.keys, self.aborted = [], [], []
        self.healthy, self.seconds, self.accepted = True, seconds, 0  # connections
        self.vocabulary, self.decode = (
            info.pop("vocabulary", 264),
            info.pop("decode", None),
        )  # number of ids; ids to a text
        self.workers: list[str] | None = None  # a router has some
        self._connections: set = set()
        self._listen(port)

    def _listen(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = _Listener(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Gone at once: open connections break."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            connection.close_now()

    def start_again(self) -> None:
        self._listen(self.port)

    def answer(self, method: str, path: str, body: dict, headers) -> tuple[int, object]:
        if path == "/health":
            return (200 if self.healthy else 503), "OK" * (self.workers is not None)  # as routers say
        if method == "GET" and self.pages != 200:
            return self.pages, ""
        if self.workers is not None:
            if path == "/workers":
                return 200, {"workers": [{"url": url, "is_healthy": True} for url in self.workers]}
            if path in ("/server_info", "/model_info"):
                return 404, ""
        if path == "/model_info":
            return 200, INFO | {k: v for k, v in self.info.items() if k in INFO}
        if path == "/server_info":
            return 200, SERVER_INFO | self.info
        if path == "/abort_request":
            self.aborted.append(body["rid"])
            return 200, ""
        if path == "/detokenize":
            return (
                (400, "no tokenizer")
                if self.decode is None
                else (200, {"text": list(map(self.decode, body["tokens"]))})
            )
        assert (method, path) == ("POST", "/generate")
        if any(int(number) >= self.vocabulary for number in body["sampling_params"].get("logit_bias", ())):
            return 400, f"logit_bias must has keys in [0, {self.vocabulary - 1}]"
        self.bodies.append(body)
        self.keys.append(headers.get("x-smg-routing-key"))
        answer = self.script(body)
        if answer is None:
            time.sleep(self.seconds)
            answer = 200, generated(body)
        return answer


class _Listener(ThreadingHTTPServer):
    request_queue_size = 256  # connections that come at once; by itself it refuses the sixth


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def setup(self):
        super().setup()
        self.fake._connections.add(self)
        self.fake.accepted += 1

    def finish(self):
        self.fake._connections.discard(self)
        super().finish()

    def close_now(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        self._answer("GET", {})

    def do_POST(self):
        self._answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, method, body):
        status, reply = self.fake.answer(method, self.path, body, self.headers)
        data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()


# A server of a value model

VALUE_INFO = {"model_path": "the-value-model", "architectures": ["Qwen2ForClassifier"], "is_generation": False}
VALUE_VOCABULARY = 264


def value_logits(ids: list[int]) -> list[float]:
    """What the fake value model thinks: a function of the trace."""
    return [0.0, (sum(ids) % 97) / 40, 0.5]


class FakeValueServer(FakeServer):
    """Answers `/encode`, and `/v1/embeddings` where it has `workers`. `row(ids)` is what it writes for a trace; `script` is
    not asked about the known sequence. `vocabulary` is the size that it tells. The first `cached` tokens of every trace count as cached."""

    def __init__(self, *args, row=lambda ids: [*value_logits(ids), float(len(ids))], cached: int = 0, **info):
        self.row, self.cached, self.known = row, cached, 0
        super().__init__(*args, **({"dtype": "float32"} | info))

    def answer(self, method: str, path: str, body: dict, headers) -> tuple[int, object]:
        if path == "/model_info" and self.pages == 200 and self.workers is None:
            return 200, VALUE_INFO | {key: value for key, value in self.info.items() if key in VALUE_INFO}
        if path != ("/encode" if self.workers is None else "/v1/embeddings"):
            assert path not in ("/encode", "/v1/embeddings", "/generate")
            return super().answer(method, path, body, headers)
        assert self.workers is None or "rid" not in body, "the router answers 422 to a list"
        traces = body["input_ids" if self.workers is None else "input"]
        known = known_traces(VALUE_VOCABULARY)
        if traces in (known, known[-1]):
            self.known += traces == known
        else:
            self.bodies.append(body)
            self.keys.append(headers.get("x-smg-routing-key"))
            if (answer := self.script(body)) is not None:
                return answer
            time.sleep(self.seconds)
        if not isinstance(traces[0], list):
            return 200, reply_of(self.row_at(traces, body["token_indices_to_pool"]))
        replies = [reply_of(self.row(ids)) | {"index": i} for i, ids in enumerate(traces)]
        return 200, replies if self.workers is None else {"data": replies[::-1]}

    def row_at(self, ids: list[int], positions: list[int]) -> list[float]:
        rows = [[0.0] * 4 if p < self.cached else [*value_logits(ids[: p + 1]), self.vocabulary] for p in positions]
        return [*(x for row in rows for x in row), float(len(ids) - self.cached)]


def reply_of(row: list[float]) -> dict:
    return {"embedding": row, "meta_info": {"finish_reason": {"type": "length", "length": 0}}}


# ---------------------------------------------------------------------------------------------------------------------
# For tests


@contextlib.contextmanager
def fake_servers(kind=FakeServer):
    """make(count, **settings): one fake server, or a list of several; all are ended."""
    made = []

    def make(count=1, kind=kind, **settings):
        new = [kind(**settings) for _ in range(count)]
        made.extend(new)
        return new if count > 1 else new[0]

    try:
        yield make
    finally:
        for server in made:
            server.kill()


def urls_of(servers) -> tuple[str, ...]:
    return tuple(server if isinstance(server, str) else server.url for server in servers)


def run_with(engine, main):
    """What main(engine) returns; the engine is closed, and no test hangs, whatever goes wrong."""

    async def run():
        try:
            async with asyncio.timeout(40):
                return await main(engine)
        finally:
            await engine.close()

    return asyncio.run(run())
