"""A chat page with thumbs for a gateway: `python -m deploy.serving.page --gateway URL --port N`.

It runs as a process of its own, listens on this machine only, and reports to nobody.
"""

import argparse
import os
from collections.abc import Iterator

import httpx
from openai import APIError, BadRequestError, OpenAI

from deploy.serving.engine import free_port
from deploy.serving.gateway import AUTO


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
        except BadRequestError as error:
            if error.code != "context_length_exceeded" or len(messages) < 3:
                yield f"⚠ {error.body['message']}", ""
                return
            messages = messages[2:]
        except APIError as error:
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


def build_page(gateway: str, key: str):
    """The page, as Gradio blocks. `gateway` ends in /v1."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    client = OpenAI(base_url=gateway, api_key=key or "none", max_retries=2, timeout=180)

    def say(text: str, history: list[dict], names: dict, request: gr.Request):
        history = [*history, {"role": "user", "content": text}]
        yield "", history, names
        for said, name in answer(client, history, request.session_hash or "page"):
            names[len(history)] = name
            yield "", [*history, {"role": "assistant", "content": said}], names

    def thumb(names: dict, consent: bool, like: gr.LikeData):
        gr.Info(rate(client, names.get(like.index, ""), bool(like.liked), consent))

    with gr.Blocks(title="Chat", analytics_enabled=False) as page:
        names = gr.State({})  # place of an answer in the talk → its id
        # The model's words are shown as they are: markdown could make the browser load an image
        # from anywhere.
        chat = gr.Chatbot(label="Chat", render_markdown=False, sanitize_html=True, buttons=[])
        text = gr.Textbox(label="Your message", placeholder="What is it for?", max_length=4000)
        label = "My thumbs, with prompt and answer, may be used to train the next model."
        consent = gr.Checkbox(False, label=label)
        text.submit(say, [text, chat, names], [text, chat, names])
        chat.like(thumb, [names, consent], None)
        gr.Button("New chat").click(lambda: ([], {}), None, [chat, names])
    return page


def open_page(gateway: str, key: str, port: int, wait: bool = True) -> tuple[object, str]:
    """Serves the page on 127.0.0.1; (the page, its address). With `wait` it returns only when it is
    ended.
    """
    page = build_page(gateway, key)
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port or free_port(),
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=not wait,
        enable_monitoring=False,
    )
    return page, address


def main() -> None:
    about, shown = __doc__.split("\n")[0], "(default: %(default)s)"
    parser = argparse.ArgumentParser("python -m deploy.serving.page", description=about)
    parser.add_argument("--gateway", default="http://127.0.0.1:8000/v1", help=shown)
    parser.add_argument("--port", type=int, default=7860, help=shown)
    options = parser.parse_args()
    address = f"http://127.0.0.1:{options.port}"
    print(f"chat page on {address}; its key, if any, is read from LAB_API_KEY")
    open_page(options.gateway, os.environ.get("LAB_API_KEY", ""), options.port)


if __name__ == "__main__":
    main()
