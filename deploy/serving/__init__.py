"""Serving: a thin gateway in front of any OpenAI-compatible engine. It imports nothing of ours
outside this folder; nothing but `worker` imports torch.

| module | holds |
|---|---|
| `limits.py` | refusals in OpenAI's error shape, API keys, rate limit, bounded queue |
| `chat.py` | what a client may send, and the answers in OpenAI's shape |
| `folders.py` | is a folder a model that can be loaded safely? |
| `prompts.py` | a prompt as the model's template writes it, and its tokens |
| `engine.py` | an engine that already runs: watched, and asked |
| `own_engine.py` | the gateway's own engine: started, restarted, ended |
| `worker.py` | the own engine's process: `transformers serve` on one folder |
| `store.py` | requests, feedback and A/B assignment in SQLite, written and read back |
| `gateway.py` | what a gateway knows and does: admits, assigns, relays, counts, records |
| `guard.py` | refuses other web sites, and ends connections on which nothing moves |
| `app.py` | its HTTP side, a FastAPI app |
| `start.py` | starts the gateway from a notebook or a test, and ends it |
| `page.py` | a chat page with thumbs |
"""
