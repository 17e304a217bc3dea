"""A chat page with thumbs for a gateway: `python -m deploy.serving.page --gateway URL --port N`.

It runs as a process of its own, listens on this machine only, and reports to nobody.
"""

import argparse
import os
import re
import socket
from collections.abc import Iterator
from html import escape

import httpx
import uvicorn
from fastapi import FastAPI
from openai import APIError, OpenAI
from starlette.middleware import Middleware

from deploy.serving.gateway import AUTO
from deploy.serving.guard import SERVER, Guard

TOO_LONG = ("context_length_exceeded", "body_too_large")  # for the model, for the gateway
OPEN_PATHS = re.compile(  # of Gradio's addresses; others take files, give files, or fetch
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info|app_id|startup-events|cancel|reset|(queue|heartbeat)/.*)/?"
)


def answer(client: OpenAI, history: list[dict], user: str) -> Iterator[tuple[str, str]]:
    """(the answer so far, its id), again and again as it grows. A failure is said in the place of
    the answer.

    Where the talk has become too long for the model, its oldest turns are left out.
    """
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    text, name = "", ""
    while True:
        try:
            request = {"model": AUTO, "messages": messages, "user": user}
            for event in client.chat.completions.create(**request, stream=True):
                name = event.id
                text += event.choices[0].delta.content or "" if event.choices else ""
                yield text.strip(), name
            return
        except APIError as error:
            if error.code in TOO_LONG and len(messages) > 2:
                messages = messages[2:]
                continue
            said = error.body.get("message") if isinstance(error.body, dict) else None
            yield f"{text}\n⚠ {said or 'The gateway does not answer. Is it running?'}".strip(), ""
            return


def rate(client: OpenAI, name: str, liked: bool, consent: bool) -> str:
    """Sends one thumb; returns what to tell the user."""
    if not name:
        return "This is no answer of a model."
    body = {"request_id": name, "rating": "up" if liked else "down", "consent": consent}
    try:
        client.post("/feedback", body=body, cast_to=httpx.Response)
    except APIError as error:
        return f"Not kept: {error.message}"
    use = "It may help to train the next model." if consent else "It is counted, not trained on."
    return f"Thank you. {use}"


def build_page(gateway: str, key: str) -> FastAPI:
    """The page as an app, for this machine alone. `gateway` ends in /v1."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    client = OpenAI(base_url=gateway, api_key=key or "none", max_retries=2, timeout=180)

    def shown(talk: list[dict]) -> list[dict]:
        # Gradio would show HTML, and so let the browser load an image from anywhere.
        return [{"role": turn["role"], "content": escape(turn["content"])} for turn in talk]

    def say(text: str, talk: list[dict], request: gr.Request):
        talk = [*talk, {"role": "user", "content": text}]
        yield "", shown(talk), talk
        for said, name in answer(client, talk, request.session_hash or "page"):
            longer = [*talk, {"role": "assistant", "content": said, "id": name}]
            yield "", shown(longer), longer

    def thumb(talk: list[dict], consent: bool, like: gr.LikeData):
        gr.Info(rate(client, talk[like.index].get("id", ""), bool(like.liked), consent))

    with gr.Blocks(title="Chat", analytics_enabled=False) as page:
        talk = gr.State([])  # its turns; answers with their ids
        chat = gr.Chatbot(label="Chat", render_markdown=False, sanitize_html=True, buttons=[])
        text = gr.Textbox(label="Your message", placeholder="What is it for?", max_length=4000)
        label = "My thumbs, with prompt and answer, may be used to train the next model."
        consent = gr.Checkbox(False, label=label)
        text.submit(say, [text, talk], [text, chat, talk])
        chat.like(thumb, [talk, consent], None)
        gr.Button("New chat").click(lambda: ([], []), None, [chat, talk])
        chat.clear(list, None, talk)
    # Nobody else's web page may speak through this one: it holds the key.
    guard = [Middleware(Guard, paths=OPEN_PATHS)]
    app = FastAPI(middleware=guard, openapi_url=None, max_body_size=1_000_000)
    settings = {"ssr_mode": False, "footer_links": [], "enable_monitoring": False}
    return gr.mount_gradio_app(app, page, "/", server_name="127.0.0.1", **settings)


def main() -> None:
    about, shown = __doc__.split("\n")[0], "(default: %(default)s)"
    parser = argparse.ArgumentParser("python -m deploy.serving.page", description=about)
    parser.add_argument("--gateway", default="http://127.0.0.1:8000/v1", help=shown)
    parser.add_argument("--port", type=int, default=7860, help=f"0 for a free one {shown}")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", options.port))
    address = "http://{}:{}".format(*listener.getsockname())
    print(f"chat page on {address}; its key, if any, is read from LAB_API_KEY")
    app = build_page(options.gateway, os.environ.get("LAB_API_KEY", ""))
    # A page in a browser never ends its connection: uvicorn would call each one an error.
    own = SERVER | {"log_level": "critical", "timeout_graceful_shutdown": 1}
    uvicorn.Server(uvicorn.Config(app, **own)).run(sockets=[listener])


if __name__ == "__main__":
    main()
