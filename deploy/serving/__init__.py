"""Serving: a thin gateway in front of any OpenAI-compatible engine. Nothing here imports torch but
`worker`.

| module | holds |
|---|---|
| `limits.py` | refusals in OpenAI's error shape, API keys, rate limit, bounded queue |
| `prompts.py` | the text and the token count of a list of messages |
| `chat.py` | what a chat request may ask, and the answers in OpenAI's shape |
| `engine.py` | one model behind an address: started, watched, restarted, asked |
| `worker.py` | the engine's own process: `transformers serve` on one folder |
| `store.py` | requests, feedback and A/B assignment in SQLite |
| `reports.py` | reads the store back: counts per arm, preference pairs |
| `gateway.py` | what a gateway knows and does: admits, assigns, relays, counts, records |
| `app.py` | its HTTP side, a FastAPI app |
| `start.py` | starts the gateway from a notebook or a test, and ends it |
| `page.py` | a chat page with thumbs |
"""
