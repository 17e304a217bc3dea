"""The gateway before a fake engine: what goes wrong, and what each side then sees."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import APIError, OpenAI
from serving_tools import ASK, WORDS, FakeEngine, gateway, now, open_stream, until

from deploy.serving.store import answers

JSON = {"content-type": "application/json"}
KEY, OTHER = "a-key-of-the-course-1", "a-key-of-the-course-2"


@pytest.fixture
def fake():
    return FakeEngine()


@pytest.fixture
def bench(tmp_path, fake):
    with gateway(tmp_path, fake) as bench:
        yield bench


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A gateway for tests that leave nothing behind but counts."""
    fake = FakeEngine()
    with gateway(tmp_path_factory.mktemp("shared"), fake) as bench:
        bench.fake = fake
        yield bench


def error_of(response: httpx.Response) -> dict:
    """OpenAI's error object: all four fields, always."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_an_answer_passes_unchanged_and_is_recorded(bench, fake):
    response = bench.post(json=ASK | {"max_tokens": 9, "temperature": 0.5})
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "".join(WORDS)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["total_tokens"] == 12
    assert (
        fake.bodies[0]["max_tokens"],
        fake.bodies[0]["temperature"],
        fake.bodies[0]["model"],
    ) == (9, 0.5, "a")
    [row] = answers(bench.store)
    assert row["id"] == answer["id"] == response.headers["x-request-id"]
    assert (row["answer"], row["model"], row["completion_tokens"]) == ("".join(WORDS), "a", 5)
    assert row["messages"] == ASK["messages"] and row["seconds"] >= row["first_token_seconds"] > 0


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"{", None, "Invalid JSON"),
        (b"[]", None, "one JSON object"),
        (b"[" * 50_000, None, "recursion limit"),
        (b"\xff\xfe", None, "Invalid JSON"),
        (b"{}", "messages", "messages: Field required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot"}]}, "messages[0]", "should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]",
            "text only",
        ),
        *(
            ({"messages": [{"role": "user", "content": content}]}, "messages[0]", said)
            for content, said in (
                ([{"type": "text", "text": ["a"]}], "text only"),
                ([{"type": "text"}], "text only"),
                ([{"type": ["text"], "text": "a"}], "text only"),
                (["a"], "text only"),
                ([["a"]], "text only"),
                ({"text": "a"}, "valid string"),
            )
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0]", "should be 'system'"),
        (ASK | {"max_tokens": -1}, "max_tokens", "from 1 to 1024, not -1"),
        (ASK | {"max_tokens": 0}, "max_tokens", "from 1 to 1024"),
        (ASK | {"max_tokens": 1.5}, "max_tokens", "valid integer, not 1.5"),
        (ASK | {"max_tokens": True}, "max_tokens", "valid integer, not True"),
        (ASK | {"max_completion_tokens": 10**30}, "max_completion_tokens", "from 1 to 1024"),
        (ASK | {"temperature": 3}, "temperature", "less than or equal to 2, not 3"),
        (ASK | {"n": 2}, "n", "does not support it"),
        (ASK | {"best_of": 2}, "best_of", "does not know"),
        (ASK | {"stream": "yes"}, "stream", "valid boolean, not yes"),
        (ASK | {"user": 7}, "user", "valid string, not 7"),
        (ASK | {"temperature": 10**400}, "temperature", "less than or equal to 2"),
        (b'{"temperature": NaN}', "messages", "Field required"),
        (b'{"user": "\\ud800"}', None, "Invalid JSON"),
        (ASK | {"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        (ASK | {"stop": list("abcde")}, "stop", "at most 4 items"),
        (ASK | {"seed": -1}, "seed", "greater than or equal to 0, not -1"),
    ],
)
def test_a_wrong_request_is_told_what_to_change_and_never_reaches_the_engine(
    shared, body, param, said
):
    before, sent = (
        shared.fake.started,
        {"json": body} if isinstance(body, dict) else {"content": body},
    )
    response = shared.post(**sent, headers={"content-type": "application/json"})
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and said in error["message"] and shared.fake.started == before


def test_values_that_change_nothing_are_accepted(shared):
    assert (
        shared.post(
            json=ASK | {"n": 1, "presence_penalty": 0, "tools": None, "metadata": {}}
        ).status_code
        == 200
    )


def test_text_parts_are_joined_and_other_keys_of_a_message_dropped(bench, fake):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "it?"}]
    message = {"role": "user", "content": parts, "name": "ada"}
    assert bench.post(json={"messages": [message]}).status_code == 200
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "What is it?"}]


def test_a_stream_counts_its_tokens_for_a_client_that_asks(shared):
    body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    *_, usage, done, _ = shared.post(json=body).text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(usage.removeprefix("data: "))["usage"]["total_tokens"] == 12


def test_a_fault_of_the_gateway_itself_is_an_error_in_the_same_shape(shared, monkeypatch):
    monkeypatch.setattr(shared.gateway, "assign", lambda *_: 1 / 0)
    response = shared.post(json=ASK)
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"


def test_infinity_is_no_temperature(shared):
    response = shared.post(content=json.dumps(ASK | {"temperature": float("inf")}), headers=JSON)
    assert response.status_code == 400 and error_of(response)["param"] == "temperature"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_10_megabytes_is_refused(shared, chunked):
    """With its length announced, and without: then it is counted as it comes in."""
    before, body = shared.fake.started, json.dumps(ASK | {"user": "x" * 10_000_000}).encode()
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    try:
        response = shared.post(content=parts if chunked else body, headers=JSON)
        assert (
            response.status_code == 413
            and "larger than 64000 bytes" in error_of(response)["message"]
        )
    except (
        httpx.WriteError
    ):  # the answer came, and the line was closed, while we were still writing
        assert chunked
    assert shared.fake.started == before and shared.post(json=ASK).status_code == 200


def test_a_form_is_not_read(shared):
    """Any web page may post a form to this machine without asking; JSON it may not."""
    response = shared.post(content=json.dumps(ASK), headers={"content-type": "text/plain"})
    assert response.status_code == 415 and "Content-Type" in error_of(response)["message"]


def test_an_unknown_model_is_answered_with_those_there_are(shared):
    response = shared.post(json=ASK | {"model": "gpt-9"})
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"
    assert "Choose one of: a, auto" in error_of(response)["message"]


def test_an_unknown_address_is_answered_with_those_there_are(shared):
    response = shared.post("completions", json=ASK)
    assert response.status_code == 404 and "/v1/chat/completions" in error_of(response)["message"]
    response = httpx.get(f"{shared.root}/v1/chat/completions", trust_env=False)
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"


def test_without_keys_only_this_machine_s_names_are_served(shared):
    for host, status in (
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example:80", 403),
    ):
        assert shared.post(json=ASK, headers={"host": host}).status_code == status, host


def test_only_the_right_key_opens(tmp_path, fake):
    with gateway(tmp_path, fake, keys=f"{KEY},{OTHER}") as bench:
        for header in (
            {},
            {"authorization": "Bearer wrong-key-wrong-key"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": f"Bearer {KEY[:-1]}"},
            {"authorization": "Bearer"},
        ):
            response = bench.post(json=ASK, headers=header)
            assert (
                response.status_code == 401
                and "Authorization: Bearer KEY" in error_of(response)["message"]
            )
            assert bench.post("feedback", json={}, headers=header).status_code == 401
            for path in ("/v1/models", "/metrics"):
                assert (
                    httpx.get(bench.root + path, headers=header, trust_env=False).status_code == 401
                )
        assert fake.started == 0
        for key in (KEY, OTHER):
            assert (
                bench.post(json=ASK, headers={"authorization": f"Bearer {key}"}).status_code == 200
            )
        for path in ("/health", "/ready"):  # a load balancer has no key
            assert httpx.get(bench.root + path, trust_env=False).status_code == 200
        assert {row["caller"] for row in answers(bench.store)}.isdisjoint({KEY, OTHER})


def test_each_key_has_its_own_rate(tmp_path, fake):
    """Three a minute: the fourth waits up to 20 s; the other key is not touched."""
    with gateway(tmp_path, fake, keys=f"{KEY},{OTHER}", requests_per_minute=3) as bench:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        assert [bench.post(json=ASK, headers=mine).status_code for _ in range(4)] == [
            200,
            200,
            200,
            429,
        ]
        response = bench.post(json=ASK, headers=mine)
        assert (
            error_of(response)["code"] == "rate_limit_exceeded"
            and 1 <= int(response.headers["retry-after"]) <= 20
        )
        assert bench.post(json=ASK, headers=theirs).status_code == 200


@pytest.mark.parametrize("fault", ["cut", "error event", "nonsense", "endless line"])
def test_a_stream_that_breaks_ends_with_an_error_event(bench, fake, fault):
    """The client has the first words, then an error: never an answer that looks whole. The next one
    is whole.
    """
    fake.fault = fault
    client, words = OpenAI(base_url=f"{bench.root}/v1", api_key="none", max_retries=0), []
    with pytest.raises(APIError) as raised:
        for event in client.chat.completions.create(**ASK, stream=True):
            words.append(event.choices[0].delta.content or "")
    assert "".join(words) == "".join(WORDS[:2]) and raised.value.code == "engine_failed"
    response = bench.post(json=ASK)
    assert response.status_code == 502 and error_of(response)["type"] == "server_error"
    assert answers(bench.store) == []  # a broken answer is no answer
    fake.fault = None
    assert bench.post(json=ASK).status_code == 200 and bench.slots.running == 0


@pytest.mark.parametrize(
    ("fault", "status"), [("status 500", 502), ("status 422", 400), ("status 429", 429)]
)
def test_a_refusal_of_the_engine_has_a_status_of_its_own_also_when_streaming(
    bench, fake, fault, status
):
    fake.fault = fault
    for stream in (False, True):
        response = bench.post(json=ASK | {"stream": stream})
        assert response.status_code == status and error_of(response)["message"]


def test_an_engine_that_is_too_slow_is_given_up_and_its_work_cancelled(tmp_path):
    fake = FakeEngine(seconds=30)
    with gateway(tmp_path, fake, timeout=0.3) as bench:
        start = now()
        response = bench.post(json=ASK)
        assert response.status_code == 504 and "within 0.3 s" in error_of(response)["message"]
        assert now() - start < 10
        until(lambda: fake.cancelled == 1 and bench.slots.running == 0, "cancelled request")


def test_a_request_waits_no_longer_than_its_time_for_a_place(tmp_path):
    fake = FakeEngine(seconds=30)
    with (
        gateway(tmp_path, fake, concurrency=1, queue=1, timeout=0.5) as bench,
        ThreadPoolExecutor(2) as pool,
    ):
        statuses = [
            f.result().status_code for f in [pool.submit(bench.post, json=ASK) for _ in range(2)]
        ]
        assert statuses == [504, 504]
        until(lambda: (bench.slots.running, bench.slots.waiting) == (0, 0), "free place")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place_and_the_engine(tmp_path, stream):
    """One place only: the next request is answered because the first was cancelled, long before its
    150 s were up.
    """
    fake = FakeEngine(seconds=30)
    with gateway(tmp_path, fake, concurrency=1, timeout=600) as bench:
        line = open_stream(bench, stream=stream)
        until(lambda: fake.started == 1, "request at the engine")
        line.close()
        until(lambda: fake.cancelled == 1 and bench.slots.running == 0, "cancelled request")
        fake.seconds = 0
        assert bench.post(json=ASK).status_code == 200


def test_a_client_that_hangs_up_in_the_middle_of_a_stream_frees_its_place(tmp_path):
    fake = FakeEngine(seconds=0.05)
    with gateway(tmp_path, fake, concurrency=1) as bench:
        line = open_stream(bench)
        received = b""
        while WORDS[0].encode() not in received:
            received += line.recv(4096)
        fake.seconds = 30
        line.close()
        until(lambda: fake.cancelled == 1 and bench.slots.running == 0, "cancelled request")


def test_a_client_that_hangs_up_while_it_waits_leaves_the_line(tmp_path):
    fake = FakeEngine(seconds=30)
    with gateway(tmp_path, fake, concurrency=1) as bench:
        first, second = open_stream(bench), open_stream(bench)
        until(lambda: bench.slots.waiting == 1 and fake.started == 1, "waiting request")
        second.close()
        until(lambda: bench.slots.waiting == 0, "empty line")
        first.close()
        until(lambda: bench.slots.running == 0, "free place")
        assert fake.started == 1


def test_shutdown_finishes_a_stream_that_has_begun(tmp_path):
    fake, received = FakeEngine(seconds=0.1), b""
    with gateway(tmp_path, fake) as bench:
        line = open_stream(bench)
        while WORDS[0].encode() not in received:
            received += line.recv(4096)
    # The block is left: the gateway was asked to end, and waited for this stream.
    while part := line.recv(4096):
        received += part
    assert b"data: [DONE]" in received and all(
        json.dumps(word).encode() in received for word in WORDS
    )


def test_an_engine_that_is_away_makes_a_request_wait_and_is_found_again(
    tmp_path, fake, monkeypatch
):
    monkeypatch.setattr("deploy.serving.engine.WATCH_SECONDS", 0.1)
    with gateway(tmp_path, fake, engine_wait=0.2) as bench:
        engine = bench.gateway.engines["a"]
        there, engine.url = engine.url, "http://127.0.0.1:9"  # nobody listens there
        until(
            lambda: httpx.get(f"{bench.root}/ready", trust_env=False).status_code == 503,
            "engine gone",
            40,
        )
        response = bench.post(json=ASK)
        assert response.status_code == 503 and error_of(response)["code"] == "engine_unavailable"
        assert int(response.headers["retry-after"]) >= 1 and bench.slots.running == 0
        engine.url = there
        until(
            lambda: httpx.get(f"{bench.root}/ready", trust_env=False).status_code == 200,
            "engine back",
            40,
        )
        assert bench.post(json=ASK).status_code == 200


def test_no_prompt_reaches_the_log_unless_asked_for(bench, caplog):
    caplog.set_level("DEBUG")
    bench.post(json=ASK)
    assert "kettle" not in caplog.text and "chatcmpl-" in caplog.text
    bench.gateway.log_prompts = True
    bench.post(json=ASK)
    assert "kettle" in caplog.text


def test_metrics_count_what_happened_and_name_no_user(bench):
    bench.post(json=ASK | {"user": "ada"})
    bench.post(json=ASK | {"max_tokens": -1})
    text = httpx.get(f"{bench.root}/metrics", trust_env=False).text
    for line in (
        'gateway_requests_total{model="a",path="chat",status="200"} 1.0',
        'gateway_engine_ready{model="a"} 1.0',
        'gateway_requests_total{model="",path="chat",status="400"} 1.0',
        'gateway_running{model="a"} 0.0',
        'gateway_tokens_total{kind="completion",model="a"} 5.0',
    ):
        assert line in text, text
    assert "ada" not in text and "kettle" not in text


def test_a_failing_store_loses_records_but_no_answers(tmp_path, fake):
    """A real SQLITE_FULL, from a limit of 16 pages: feedback is refused with 507, chat goes on."""
    with gateway(tmp_path, fake, max_bytes=16 * 4096) as bench:
        first = bench.post(json=ASK).json()["id"]
        long = {"messages": [{"role": "user", "content": "x" * 60_000}]}
        assert bench.post(json=long).status_code == 200
        text = httpx.get(f"{bench.root}/metrics", trust_env=False).text
        assert "gateway_records_lost_total 1.0" in text
        kept, better = 0, {"rating": "down", "correction": "y" * 19_999}
        response = bench.post("feedback", json={"request_id": first, **better})
        while response.status_code == 200 and kept < 20:
            kept, name = kept + 1, bench.post(json=ASK).json()["id"]
            response = bench.post("feedback", json={"request_id": name, **better})
        assert response.status_code == 507 and "full" in error_of(response)["message"]
        assert bench.post(json=ASK).status_code == 200


def test_threads_end_with_the_gateway(tmp_path, fake):
    before = threading.active_count()
    with gateway(tmp_path, fake) as bench:
        bench.post(json=ASK)
    until(lambda: threading.active_count() <= before, "end of all threads")


def test_a_body_that_does_not_come_is_given_up(tmp_path, fake):
    """Half a body, and then nothing: after the time limit of 1 s the answer is 408."""
    with gateway(tmp_path, fake, timeout=1) as bench:
        host, port = bench.root.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as line:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n"
            line.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            assert line.recv(4096).startswith(b"HTTP/1.1 408")
        assert bench.post(json=ASK).status_code == 200
