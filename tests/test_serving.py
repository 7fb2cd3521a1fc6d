"""A merged checkpoint behind an OpenAI-compatible server says over HTTP what the attached adapter says here."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chassis.merge import merge_to
from chassis.models import load_causal_lm
from chassis.port import attach
from chassis.results import continuation
from support import fitted, pair
from transformers.utils.import_utils import is_serve_available

EXAMPLES = Path(__file__).parents[1] / "examples" / "serving"
PROMPTS = ["the quick brown", "def f(x):", "lazy"]

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs the extra transformers[serving]")


@pytest.fixture
def server(tiny_lm, tiny_tokenizer, tmp_path):
    """(url, folder of the merged checkpoint, base, adapter) while `transformers serve` runs on the checkpoint."""
    base, expert = pair(tiny_lm, tiny_tokenizer)
    adapter = fitted(base, expert, tiny_tokenizer)
    base.model.generation_config.eos_token_id = None
    base.model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    merge_to(tmp_path / "base", adapter, tmp_path / "merged")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    options = ["serve", str(tmp_path / "merged"), "--device", "cpu", "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *options], stdout=log, stderr=log)
    try:
        _wait(process, f"http://localhost:{port}/health", tmp_path / "log")
        yield f"http://localhost:{port}/v1", tmp_path / "merged", base, adapter
    finally:
        process.terminate()
        process.wait(30)


def _wait(process, url, log, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def test_the_server_says_what_the_attached_adapter_says(server, tiny_tokenizer):
    url, folder, base, adapter = server
    spec = importlib.util.spec_from_file_location("complete", EXAMPLES / "complete.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    answers = [example.complete(url, str(folder), prompt, 12) for prompt in PROMPTS]
    merged, tokenizer = load_causal_lm(folder)
    with attach(base.model, adapter.fold_bias()):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer == continuation(base.model, tiny_tokenizer, prompt, 12)
            assert answer == continuation(merged, tokenizer, prompt, 12)
    assert any(answers)
