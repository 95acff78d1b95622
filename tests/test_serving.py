"""The server, asked by real clients: OpenAI's, lm-eval, browsers, and those that misbehave."""
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from laws import perturbed

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
import httpx  # noqa: E402
import openai  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from shell import refused  # noqa: E402

from sprout_lab.data.tokenizers import ByteTokenizer  # noqa: E402
from sprout_lab.decoding.sampling import generate_text  # noqa: E402
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig  # noqa: E402
from sprout_lab.models.transformer import (  # noqa: E402
    TransformerConfig, TransformerForCausalLM)
from sprout_lab.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402
from sprout_lab.serving.registry import ServerConfig  # noqa: E402
from sprout_lab.serving.server import ServerThread  # noqa: E402

SHAPE = dict(hidden_size=32, num_hidden_layers=2, vocab_size=256)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or ByteTokenizer()).save_pretrained(folder)
    return folder


def attention_model(room: int = 512):
    torch.manual_seed(0)
    return perturbed(TransformerForCausalLM(TransformerConfig(**SHAPE,
                                                              max_position_embeddings=room)))


def llama_with_a_template(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{c: k + 2 for k, c in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1))
    return save(model, folder, tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    recurrent = perturbed(SimplifiedSLMForCausalLM(SLMConfig(**SHAPE)), scale=0.1)
    return {"attention": save(attention_model().float(), root / "attention"),
            "recurrent": save(recurrent.float(), root / "recurrent"),
            "llama": llama_with_a_template(root / "llama")}


@pytest.fixture(scope="module")
def server(folders):
    with ServerThread(folders.values()) as running: yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server, name, prompt, **options):
    "The text that the lab writes without a server."
    scheduler = server.registry.get(name).scheduler
    model = scheduler.engine.model
    return generate_text(model, scheduler.tokenizer, prompt,
                         **{"top_k": 0, "top_p": 1.0, **options})[0]


def gauge(server, name, model="attention") -> float:
    text = httpx.get(f"{server.url}/metrics").text
    line = next(x for x in text.splitlines() if x.startswith(f'sprout_lab_{name}{{model="{model}"'))
    return float(line.split()[-1])


def wait_until(true, seconds: float = 180.0):      # only what hangs takes so long
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "this did not come true in time"
        time.sleep(0.02)


ON_AND_ON = {"122": 100}      # only ever a z: no text ends by itself


@contextmanager
def held(scheduler):
    """Let a scheduler write one token per text and then wait, until the block is left: what a test
    does in between does not depend on how fast anything is."""
    gate, step = threading.Event(), scheduler.batch.step
    def waiting_step():
        step()
        gate.wait(300)
    scheduler.batch.step = waiting_step
    try: yield
    finally:
        scheduler.batch.step = step
        gate.set()


def posted(address: str, body: dict, buffer: int | None = None) -> socket.socket:
    "A connection over which a completion was asked for; `buffer`: the bytes it takes unread."
    host, port = address.removeprefix("http://").split(":")
    raw = socket.socket()
    if buffer: raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.connect((host, int(port)))
    content = json.dumps(body).encode()
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
    return raw


# The API, through the client that everyone has

@pytest.mark.parametrize("name", ["attention", "recurrent"])
def test_the_openai_client_gets_what_the_lab_writes(server, client, name):
    options = dict(max_tokens=30, temperature=0.8, seed=5)
    expected = alone(server, name, "To be", **options)
    whole = client.completions.create(model=name, prompt="To be", **options)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 30)
    pieces = list(client.completions.create(model=name, prompt="To be", stream=True,
                                            stream_options={"include_usage": True}, **options))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == expected
    assert pieces[-1].usage.total_tokens == 35 and not pieces[-1].choices


def test_the_async_client_streams(server):
    async def read():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            async def one(k):
                stream = await client.completions.create(model="attention", prompt=f"{k}", seed=k,
                                                         max_tokens=20, stream=True)
                return "".join([p.choices[0].text async for p in stream])
            return await asyncio.gather(*map(one, range(6)))
    texts = asyncio.run(read())
    for k, text in enumerate(texts):
        assert text == alone(server, "attention", f"{k}", seed=k, max_tokens=20, temperature=1.0)


def test_several_samples_and_prompts(server, client):
    answer = client.completions.create(model="attention", prompt=["ab", "cd"], n=2, seed=3,
                                       max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    model = server.registry.get("attention").scheduler.engine.model
    expected = generate_text(model, ByteTokenizer(), ["ab", "cd"], num_samples=2, seed=3, top_k=0,
                             max_tokens=8, top_p=1.0)
    assert [choice.text for choice in answer.choices] == expected
    ids = client.completions.create(model="attention", prompt=[[97, 98], [99, 100]], n=2, seed=3,
                                    max_tokens=8)
    assert [choice.text for choice in ids.choices] == expected


def test_best_of_is_the_likeliest(client):
    options = dict(model="attention", prompt="x", seed=1, max_tokens=6, logprobs=0)
    all_of_them = client.completions.create(n=5, **options).choices
    best = client.completions.create(n=1, best_of=5, **options).choices
    scores = {c.text: sum(c.logprobs.token_logprobs) for c in all_of_them}
    assert [c.text for c in best] == [max(scores, key=scores.get)]


def test_echo_scores_the_prompt_as_one_forward_pass(server, client):
    text = "It was the best of times"
    answer = client.completions.create(model="attention", prompt=text, echo=True, max_tokens=1,
                                       logprobs=3, temperature=0).choices[0]
    assert answer.text.startswith(text) and answer.logprobs.text_offset[3] == 3
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        model = server.registry.get("attention").scheduler.engine.model
        scores = model(ids, use_cache=False).logits[0].log_softmax(-1)
    assert answer.logprobs.token_logprobs[0] is None
    for k in range(1, len(text)):
        assert abs(answer.logprobs.token_logprobs[k] - scores[k - 1, ids[0, k]].item()) < 1e-4
        best = max(answer.logprobs.top_logprobs[k].values())
        assert abs(best - scores[k - 1].max().item()) < 1e-4


def test_biases_penalties_and_stops(server, client):
    def text(**options):
        return client.completions.create(model="attention", prompt="q", max_tokens=24,
                                         temperature=0, **options).choices[0]
    assert text(logit_bias={"122": 100}).text == "z" * 24
    varied = text(frequency_penalty=2, presence_penalty=2, logit_bias={"122": 6})
    assert varied.text.count("z") < 24
    stopped = text(logit_bias={"122": 100}, stop=["zzz"])
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    everything = alone(server, "attention", "q", max_tokens=24, temperature=0)
    assert text(stop=everything[5:8]).text == everything[:everything.index(everything[5:8])]


def test_chat_where_there_is_a_template(server, client):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    options = dict(max_tokens=12, temperature=0.9, seed=4)
    expected = alone(server, "llama", "system: Be brief.\nuser: Hello\nassistant:", **options)
    reply = client.chat.completions.create(model="llama", messages=talk, logprobs=True,
                                           top_logprobs=2, **options)
    assert reply.choices[0].message.content == expected
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    pieces = list(client.chat.completions.create(model="llama", messages=talk, stream=True,
                                                 **options))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="attention", messages=talk)


def test_models_and_their_cards(server, client):
    assert [m.id for m in client.models.list()] == ["attention", "recurrent", "llama"]
    assert client.models.retrieve("llama").chat is True
    with pytest.raises(openai.NotFoundError, match="attention"):
        client.completions.create(model="atention", prompt="a")


def test_a_known_beginning_is_not_read_again(server, client):
    text = "It is a truth universally acknowledged, that a single man. " * 6
    first = client.completions.create(model="recurrent", prompt=text, max_tokens=3, temperature=0)
    again = client.completions.create(model="recurrent", prompt=text + "So", max_tokens=3)
    same = client.completions.create(model="recurrent", prompt=text, max_tokens=3, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == len(text)
    assert same.choices[0].text == first.choices[0].text


@pytest.mark.parametrize("name", ["attention", "recurrent"])
def test_an_instruction_before_questions_is_read_twice(server, client, name):
    "The second question shows what the two share; the third and all others need not read it."
    instruction, known = f"Answer briefly, {name}, and in the tone of a lighthouse keeper. " * 3, []
    for question in ("Who?", "When?", "Where to?", "Why not?"):
        options = dict(max_tokens=6, temperature=0)
        reply = client.completions.create(model=name, prompt=instruction + question, **options)
        assert reply.choices[0].text == alone(server, name, instruction + question, **options)
        known.append(reply.usage.prompt_tokens_details.cached_tokens)
    shared = (len(instruction) + 1) // 64 * 64       # in blocks, with the token that begins a text
    assert known[:2] == [0, 0] and known[2] == known[3] >= shared - 64 > 64


# Many at once

def test_alone_and_among_thirty_one_others(server, client):
    """Mixed lengths, settings and families at once, whole and as streams: nothing hangs, and each
    text is the one that is made alone."""
    rng = random.Random(0)
    def request(k):
        prompt = "".join(rng.choice("abcde fgh") for _ in range(rng.randrange(1, 300)))
        return dict(model=["attention", "recurrent", "llama"][k % 3], prompt=prompt, seed=k,
                    max_tokens=rng.randrange(1, 80), temperature=rng.choice([0, 0.7, 1.0]))
    requests = [request(k) for k in range(32)]
    def text(request):
        if request["seed"] % 2: return client.completions.create(**request).choices[0].text
        pieces = client.completions.create(stream=True, **request)
        return "".join(piece.choices[0].text for piece in pieces)
    with ThreadPoolExecutor(32) as pool: texts = list(pool.map(text, requests, timeout=600))
    for request, written in zip(requests, texts):
        options = {k: v for k, v in request.items() if k not in ("model", "prompt")}
        assert written == alone(server, request["model"], request["prompt"], **options)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server, stream):
    "Between its leaving and the free place lies one turn: not a token is written for it any more."
    scheduler = server.registry.get("attention").scheduler
    before = scheduler.written_tokens
    with held(scheduler):
        with posted(server.url, dict(model="attention", prompt="a", max_tokens=400, n=8,
                                     stream=stream, logit_bias=ON_AND_ON)) as raw:
            wait_until(lambda: len(scheduler.batch) == 8)
            if stream: assert raw.recv(100).startswith(b"HTTP/1.1 200")
        requests = [sequence.request for sequence in scheduler.batch.sequences]
        wait_until(lambda: all(request.cancelled for request in requests))
    wait_until(lambda: not scheduler.busy())
    assert gauge(server, "running") == 0
    assert scheduler.written_tokens == before + 8


def test_a_full_queue_says_when_to_come_back(folders):
    config = ServerConfig(port=0, max_rows=1, max_waiting=1)
    with ServerThread([folders["attention"]], config) as server:
        refused_ones = []
        def ask(_):
            reply = httpx.post(f"{server.url}/v1/completions", timeout=600,
                               json=dict(prompt="a", max_tokens=20, logit_bias=ON_AND_ON))
            if reply.status_code == 429: refused_ones.append(reply)
            return reply.status_code
        scheduler = server.registry.get("attention").scheduler
        with ThreadPoolExecutor(8) as pool:
            with held(scheduler):
                first = pool.submit(ask, 0)
                wait_until(lambda: scheduler.written_tokens)
                codes = pool.map(ask, range(7))
                wait_until(lambda: len(refused_ones) >= 6)
        assert first.result() == 200 and sorted(codes) == [200] + [429] * 6   # one more waits
    for reply in refused_ones:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"


def test_a_stalled_reader_is_let_go(folders):
    """It reads nothing: its text is written all the same, the next one has the place, and once
    nothing moved for `read_seconds` the connection is closed and all of it forgotten."""
    config = ServerConfig(port=0, max_rows=1, read_seconds=1)
    with ServerThread([folders["attention"]], config) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        state = server.server.config.app.state
        slow = posted(server.url, dict(prompt="a", max_tokens=300, stream=True, logprobs=20,
                                       logit_bias=ON_AND_ON), buffer=4096)
        wait_until(lambda: server.registry.get("attention").scheduler.written_tokens)
        quick = httpx.post(f"{server.url}/v1/completions", json=dict(prompt="b", max_tokens=5),
                           timeout=600)
        assert quick.status_code == 200
        wait_until(lambda: state.open == 0)
        with slow: assert b"[DONE]" not in everything(slow)


def everything(raw: socket.socket) -> bytes:
    "What comes until the other side closes, or breaks off."
    parts = []
    raw.settimeout(180)
    with suppress(ConnectionError):
        while part := raw.recv(65536): parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [
    b"", b"GET /health HTTP/1.1\r\nHost: local",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 50\r\n\r\n{\"prompt\": "], ids=["nothing", "half a head", "half a body"])
def test_half_a_request_is_not_waited_for(folders, sent):
    with ServerThread([folders["attention"]], ServerConfig(port=0, read_seconds=0.5)) as server:
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
            raw.sendall(sent)
            answer = everything(raw)
        assert not answer or answer.split()[1] == b"408"
        wait_until(lambda: server.server.config.app.state.open == 0)


def test_time_is_bounded(folders):
    config = ServerConfig(port=0, request_seconds=0.05)
    with ServerThread([folders["attention"]], config) as server:
        reply = httpx.post(f"{server.url}/v1/completions", json=dict(prompt="a", max_tokens=500),
                           timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert gauge(server, "running") == 0


# What must be refused

def test_a_key_is_asked_for(folders):
    with ServerThread([folders["attention"]], ServerConfig(port=0, api_key="sesame")) as server:
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)
        assert right.completions.create(model="attention", prompt="a").choices
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesam", max_retries=0)
        with pytest.raises(openai.AuthenticationError): wrong.models.list()
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_nothing_of_the_inside_is_told(server, folders):
    for path in ("/", "/health", "/v1/models", "/nothing", "/metrics", "/docs"):
        reply = httpx.get(server.url + path)
        assert "server" not in reply.headers and "access-control-allow-origin" not in reply.headers
        for secret in ("Traceback", str(folders["attention"].parent), "uvicorn", "fastapi"):
            assert secret not in reply.text
    evil = httpx.post(f"{server.url}/v1/completions", content='{"prompt": "a"}',
                      headers={"content-type": "text/plain", "origin": "https://evil.example"})
    assert evil.status_code == 415
    assert httpx.get(server.url, headers={"host": "evil.example"}).status_code == 403


def test_bounds(folders):
    config = ServerConfig(port=0, max_body_bytes=1000, max_n=2, max_prompt_tokens=50, max_tokens=9)
    with ServerThread([folders["attention"]], config) as server:
        def ask(**body): return httpx.post(f"{server.url}/v1/completions", json=body)
        assert ask(prompt="a" * 2000).status_code == 413
        for body in (dict(prompt="a" * 60), dict(prompt="a", n=3), dict(prompt="a", max_tokens=10)):
            reply = ask(**body)
            assert reply.status_code == 400 and reply.json()["error"]["message"]
        def parts():
            for _ in range(50): yield b"x" * 100
        chunked = httpx.post(f"{server.url}/v1/completions", content=parts(),
                             headers={"content-type": "application/json"})
        assert chunked.status_code == 413


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=3), max_leaves=6)
_WRONG = st.sampled_from(["wrong type", "out of range", "unknown", "missing", "no object", "bytes"])


def _out_of_range(field: str):
    return {"temperature": 2.5, "top_p": 0, "top_k": -1, "n": 0, "seed": 2**64, "max_tokens": -1,
            "presence_penalty": 3, "frequency_penalty": -3, "logprobs": 21, "best_of": 0,
            "top_logprobs": 21, "max_completion_tokens": 0}.get(field, {"unheard": 1})


@pytest.fixture(scope="module")
def raw(server):
    with httpx.Client(base_url=server.url, timeout=30) as client: yield client


@settings(max_examples=500, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_five_hundred_malformed_requests(raw, data):
    """Fuzzed from the schema of both bodies: each is refused with a 4xx in the API's form."""
    path, kind, good = data.draw(st.sampled_from([
        ("/v1/completions", CompletionRequest, {"model": "attention", "prompt": "a"}),
        ("/v1/chat/completions", ChatRequest, {"model": "llama", "messages": [
            {"role": "user", "content": "a"}]})]))
    how, headers = data.draw(_WRONG), {"content-type": "application/json"}
    field = data.draw(st.sampled_from(sorted(kind.model_fields)))
    required = "prompt" if kind is CompletionRequest else "messages"
    if how == "wrong type": content = {**good, field: {"unheard": data.draw(_JSON)}}
    elif how == "out of range": content = {**good, field: _out_of_range(field)}
    elif how == "unknown":
        names = st.text(min_size=1, max_size=12).filter(lambda n: n not in kind.model_fields)
        content = {**good, data.draw(names): data.draw(_JSON)}
    elif how == "missing": content = {k: v for k, v in good.items() if k != required}
    elif how == "no object": content = data.draw(_JSON.filter(lambda v: not isinstance(v, dict)))
    else:
        content = data.draw(st.binary(max_size=60))
        name = data.draw(st.sampled_from(["content-type", "content-encoding", "accept", "x-odd"]))
        headers[name] = data.draw(st.text("abc/=;\t 019é", max_size=20)).strip().encode("latin-1")
    if how != "bytes": content = json.dumps(content).encode()
    reply = raw.post(path, content=content, headers=headers)
    assert 400 <= reply.status_code < 500, (reply.status_code, content, headers, reply.text)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_the_server_lives_after_broken_heads(server):
    host, port = server.url.removeprefix("http://").split(":")
    rng = random.Random(0)
    for k in range(30):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            line = [b"GET / HTTP/9.9", b"\x00\xff", b"POST /v1/completions", b"GET /%00 HTTP/1.1",
                    b"GET / HTTP/1.1\r\nContent-Length: -1", b"A" * 70000][k % 6]
            junk = bytes(rng.randrange(256) for _ in range(40))
            raw.sendall(line + b"\r\n" + junk + b"\r\n\r\n")
            answer = raw.recv(200)
            assert not answer or answer.split()[1].startswith(b"4")
    assert httpx.get(f"{server.url}/health").status_code == 200


# Processes: signals, kill -9, a run that is still being trained

def _command(*words):
    code = "from sprout_lab.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, words)]


def _started(folder, *flags):
    "(process, url) of `sprout-lab serve` once it answers."
    process = subprocess.Popen(_command("serve", folder, "--port", "0", *flags), text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if line.startswith("serving "): return process, line.split(" at ")[1].split()[0]
    raise AssertionError(f"it did not start: {process.wait()}")


def takes_requests(url: str) -> bool:
    try: return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.HTTPError: return False


def test_sigterm_drains_and_kill_is_survived(folders):
    """A stream that runs when SIGTERM comes is written to its end, and the exit code is 0. After
    kill -9 the same port serves again."""
    process, url = _started(folders["attention"])
    body = dict(prompt="a", max_tokens=300, stream=True)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert process.wait(timeout=180) == 0
    port = url.rsplit(":", 1)[1]
    process, url = _started(folders["attention"], "--port", port)
    process.kill()
    process.wait()
    process, again = _started(folders["attention"], "--port", port)
    try:
        assert again == url and httpx.get(f"{again}/health").json() == {"status": "ok"}
        many = dict(prompt=["a"] * 100, max_tokens=500, stream=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=many, timeout=600) as reply:
            next(reply.iter_lines())
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not takes_requests(url))       # it has seen the first one
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=180) == 143
    finally: process.kill()


def test_the_command_says_in_one_line_what_is_wrong(folders, tmp_path):
    assert "no such run" in refused(f"serve {tmp_path / 'nowhere'}")
    assert "needs a key" in refused(f"serve {folders['attention']} --host 0.0.0.0")
    assert "cannot be listened on" in refused(f"serve {folders['attention']} --host 192.0.2.1 "
                                              "--api_key k")
    twice = refused(f"serve a={folders['llama']} a={folders['attention']}")
    assert "two models of this name" in twice


def test_served_while_it_trains_and_reloaded_when_best_changes(tmp_path):
    """A run is served from its first checkpoint on; training goes on beside it; a reload takes the
    new best, and what is being written then is written to its end by the old one."""
    from sprout_lab.families import configure, make_trainer
    flags = dict(output_dir=str(tmp_path / "run"), max_steps=20, eval_interval=10,
                 save_interval=10, batch_size=4, sequence_length=32, hidden_size=32,
                 num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    trainer = make_trainer(configure("transformer", {k: str(v) for k, v in flags.items()},
                                     log=lambda line: None), log=lambda line: None)
    best = tmp_path / "run" / "checkpoints" / "best"
    training = threading.Thread(target=trainer.train)
    training.start()
    wait_until(lambda: best.exists() or not training.is_alive(), 120)
    with ServerThread([tmp_path / "run"]) as server:
        def ask(): return httpx.post(f"{server.url}/v1/completions", timeout=60, json=dict(
            prompt="a", max_tokens=5)).status_code
        while training.is_alive(): assert ask() == 200
        training.join()
        step = server.registry.get("run").step
        reply = httpx.post(f"{server.url}/v1/models/run/reload", json={}, timeout=60).json()
        assert reply["step"] == 20 and reply["reloaded"] == (step != 20)
        assert httpx.post(f"{server.url}/v1/models/run/reload",
                          json={}).json()["reloaded"] is False
        assert ask() == 200


def test_a_ternary_export_is_served(tmp_path):
    from sprout_lab.models.ternary import export_ternary
    torch.manual_seed(0)
    model = SimplifiedSLMForCausalLM(SLMConfig(**SHAPE))
    (tmp_path / "packed").mkdir()
    export_ternary(model.eval(), tmp_path / "packed")
    ByteTokenizer().save_pretrained(tmp_path / "packed")
    with ServerThread([tmp_path / "packed"]) as server:
        options = dict(max_tokens=20, seed=2)
        def ask(_):
            body = dict(prompt="To be", **options)
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            return reply.json()["choices"][0]["text"]
        with ThreadPoolExecutor(6) as pool: texts = set(pool.map(ask, range(6)))
        assert texts == {alone(server, "packed", "To be", temperature=1.0, **options)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_benchmark_leaves_no_server_behind(folders, number):
    "However the benchmark ends, the servers that it started end with it."
    code = ("import sys, time; from sprout_lab.serving.load import BenchServer; "
            "server = BenchServer('plain', sys.argv[1]).__enter__(); "
            "print(server.port, flush=True); time.sleep(3600)")
    process = subprocess.Popen([sys.executable, "-c", code, str(folders["llama"])],
                               stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())
    process.send_signal(number)
    process.wait()
    def gone():
        with socket.socket() as probe: return probe.connect_ex(("127.0.0.1", port)) != 0
    wait_until(gone)


# lm-eval over HTTP

def test_lm_eval_finds_the_same_scores_as_in_this_process(server, folders, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval, an optional package")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from sprout_lab.evaluation.harness import HarnessModel
    from lm_eval.api.instance import Instance
    assert lm_eval
    scheduler = server.registry.get("attention").scheduler
    own = HarnessModel(scheduler.engine.model, scheduler.tokenizer)
    remote = LocalCompletionsAPI(
        model="attention", base_url=f"{server.url}/v1/completions", tokenizer_backend="huggingface",
        tokenizer=str(folders["attention"]), num_concurrent=1, max_length=512)
    pairs = [("To be or", " not"), ("The question", " is this"), ("a", "b")]
    def requests(): return [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)]
    here, there = own.loglikelihood(requests()), remote.loglikelihood(requests())
    for (score, greedy), (other, other_greedy) in zip(here, there):
        assert abs(score - other) < 1e-3 and greedy == other_greedy
    def texts(): return [Instance("generate_until", {}, (context, {
        "until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}), 0) for context, _ in pairs]
    assert own.generate_until(texts()) == remote.generate_until(texts())


# The page

def test_the_page_in_a_browser(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser")
                     if os.path.exists(p)), None)
    if chromium is None: pytest.skip("needs chromium")
    shots = os.environ.get("SCREENSHOTS", str(tmp_path))
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, scheme in (("wide", 1200, "light"), ("phone", 375, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            problems, asked = [], []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda m: m.type == "error" and problems.append(m.text))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(server.url)
            page.wait_for_selector("#models input")
            page.fill("#seed", "1")
            page.focus("#prompt")
            page.keyboard.press("Control+Enter")             # by keyboard alone from here
            page.wait_for_function("() => [...document.querySelectorAll('.facts')].length == 2 && "
                                   "[...document.querySelectorAll('.facts')].every(f => "
                                   "f.textContent.includes('ended by its length'))")
            page.focus(".token[tabindex='0']")
            for key in ("ArrowRight", "ArrowRight", "ArrowLeft"): page.keyboard.press(key)
            assert page.locator(".why:visible tr").count() >= 2
            assert "bits" in page.locator(".why:visible").inner_text()
            written = page.locator(".text").first.inner_text()
            assert written.startswith("Once upon a time") and len(written) > 60
            page.wait_for_function("document.getElementById('load').textContent.includes('places')")
            fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            assert page.evaluate(fits), "it scrolls sideways"
            page.screenshot(path=f"{shots}/{name}.png", full_page=True)
            assert not problems and all(url.startswith((server.url, "data:")) for url in asked)
            page.close()
        browser.close()


# Long ones

def _resident(process) -> int:
    "Resident memory of a process, in kilobytes."
    with open(f"/proc/{process.pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1])


def _ask_many(url, bodies, threads: int = 16) -> list:
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda body: client.post("/v1/completions", json=body), bodies))


@pytest.mark.slow   # two thousand requests
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow(folders):
    """After 2,000 requests of mixed lengths within 5% of that after 200."""
    process, url = _started(folders["attention"], "--prefix_cache_mb", "4")
    rng = random.Random(0)
    def bodies(n):
        return [dict(prompt="".join(rng.choice("abcdefgh") for _ in range(rng.randrange(1, 200))),
                     max_tokens=rng.randrange(1, 12), stream=k % 2 == 0) for k in range(n)]
    try:
        assert {r.status_code for r in _ask_many(url, bodies(200))} == {200}
        early = _resident(process)
        assert {r.status_code for r in _ask_many(url, bodies(1800))} == {200}
        late = _resident(process)
        print(f"resident after 200: {early} kB, after 2,000: {late} kB, {late / early - 1:+.1%}")
        assert late <= 1.05 * early
    finally: process.kill()


@pytest.mark.slow   # a minute by its nature
def test_thirty_two_clients_for_a_minute(server, client):
    """Mixed lengths, families and kinds; nothing hangs, and no text differs from the one made
    alone."""
    rng, end, texts = random.Random(1), time.monotonic() + 60, []
    known = [dict(model=["attention", "recurrent", "llama"][k % 3], seed=k,
                  prompt="".join(rng.choice("abcde fgh") for _ in range(rng.randrange(1, 200))),
                  max_tokens=rng.randrange(1, 60), temperature=rng.choice([0, 0.7, 1.0]))
             for k in range(24)]
    def client_loop(number):
        own = random.Random(number)
        while time.monotonic() < end:
            k = own.randrange(len(known))
            if own.random() < 0.5:
                pieces = client.completions.create(stream=True, **known[k])
                texts.append((k, "".join(p.choices[0].text for p in pieces)))
            else:
                texts.append((k, client.completions.create(**known[k]).choices[0].text))
    with ThreadPoolExecutor(32) as pool: list(pool.map(client_loop, range(32), timeout=240))
    for k, request in enumerate(known):
        options = {n: v for n, v in request.items() if n not in ("model", "prompt")}
        expected = alone(server, request["model"], request["prompt"], **options)
        assert {text for number, text in texts if number == k} <= {expected}
    print(f"{len(texts)} texts")
    assert len(texts) > 100


@pytest.mark.slow   # starts a cluster of processes
def test_ray_serve_answers_as_the_server_does(server, folders):
    pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)
    import ray
    from ray import serve
    from sprout_lab.serving.ray_serve import application
    with socket.create_server(("127.0.0.1", 0)) as listener: port = listener.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1",
             object_store_memory=80 * 10**6, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"models": str(folders["attention"]), "replicas": "2",
                               "cpus": "0.5", "max_tokens": "40"}))
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        def text(k):
            options = dict(model="attention", prompt=f"To be {k}", seed=k, max_tokens=20)
            if k % 2: return client.completions.create(**options).choices[0].text
            pieces = client.completions.create(stream=True, **options)
            return "".join(piece.choices[0].text for piece in pieces)
        with ThreadPoolExecutor(4) as pool: texts = list(pool.map(text, range(8)))
        for k, written in enumerate(texts):
            assert written == alone(server, "attention", f"To be {k}", seed=k, max_tokens=20,
                                    temperature=1.0)
        with pytest.raises(openai.BadRequestError, match="at most 40"):
            client.completions.create(model="attention", prompt="a", max_tokens=41)
    finally:
        serve.shutdown()
        ray.shutdown()
