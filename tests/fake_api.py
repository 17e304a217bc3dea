"""A small OpenAI-compatible server in this process; nothing here is under test."""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fake:
    """An OpenAI-compatible server. `answer(body, number)` is the reply's text, (status, headers) of
    a failure, bytes that stand in the place of a reply, or None to hang up.
    """

    def __init__(self):
        self.requests, self.lock, self.answer = [], threading.Lock(), self.by_length
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(
                        {
                            **body,
                            "path": self.path,
                            "headers": {k.lower(): v for k, v in self.headers.items()},
                        }
                    )
                    number = len(fake.requests)
                found = fake.answer(body, number)
                if found is None:  # hang up without a word
                    self.connection.close()
                    return
                status, headers, reply = 200, {}, None
                if isinstance(found, str):
                    message = {"role": "assistant", "content": found.removesuffix("<cut>")}
                    reason = "length" if found.endswith("<cut>") else "stop"
                    reply = {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": body["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                    }
                    reply["usage"] = {
                        "prompt_tokens": 10,
                        "completion_tokens": 2,
                        "total_tokens": 12,
                    }
                elif isinstance(found, bytes):
                    reply = found
                else:
                    status, headers = found
                    reply = {"error": {"message": f"no, {self.headers['Authorization']}"}}
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": len(text),
                    **headers,
                }.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def by_length(self, body: dict, number: int) -> str:
        """Answers get longer with each request; the judge prefers the longer one."""
        text = body["messages"][-1]["content"]
        if "[Answer A]" not in text:
            return f"{text} {'so ' * number}".strip()
        first, second = (
            between(text, "[Answer A]", "[Answer B]"),
            between(text, "[Answer B]", "Reply"),
        )
        return "A" if len(first) > len(second) else "B"


def between(text: str, start: str, end: str) -> str:
    return text.split(start)[1].split(end)[0].strip()


@contextmanager
def servers(monkeypatch, count: int):
    """So many servers, in an environment where all that is meant for OpenAI is called official."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", f"official-{name}")
    custom = "X-Team: official-team\nauthorization: official-bearer\nopenai-project: official-two"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("LAB_SAMPLER_KEY", "secret-key")
    monkeypatch.delenv("LAB_JUDGE_KEY", raising=False)
    found = [Fake() for _ in range(count)]
    yield found
    for one in found:
        one.server.shutdown()
        one.server.server_close()
