"""The port: rows take their own experts, mixtures add up, and the base stays what it was, in whatever runs the model."""

import pytest
import torch
from chassis.adapter import Adapter, AdapterConfig, combine
from chassis.errors import ChassisError
from chassis.models import inspect_head
from chassis.port import Port
from chassis.routing import least_surprised, parse_route, surprise
from transformers import LogitsProcessor, LogitsProcessorList

WIDTH, VOCABULARY = 32, 300
PROMPTS = ["the quick brown", "def x return class", "fox"]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


def random_adapter(seed, rank=4, columns=None, size=1.0):
    g = torch.Generator().manual_seed(seed)
    k = columns or VOCABULARY
    cols = torch.randperm(VOCABULARY, generator=g)[:k].sort().values if columns else None
    U, V = torch.randn(WIDTH, rank, generator=g) * WIDTH**-0.5, torch.randn(rank, k, generator=g) * size
    bias, mean = torch.randn(k, generator=g) * size, torch.randn(WIDTH, generator=g) * 0.1
    return Adapter(U, V, bias, mean, torch.zeros(WIDTH), cols, AdapterConfig(vocab_size=VOCABULARY, expert=f"expert {seed}"))


@pytest.fixture
def adapters():
    return {"code": random_adapter(1), "docs": random_adapter(2, rank=7, columns=120), "law": random_adapter(3, 2, 120)}


@pytest.fixture
def model(tiny_lm):
    return tiny_lm("llama", tie_word_embeddings=False)


@pytest.fixture
def port(model, adapters):
    with Port(model) as port:
        for name, adapter in adapters.items():
            port.plug(name, adapter)
        yield port


@pytest.fixture
def batch(tiny_tokenizer):
    """Left-padded ids and mask of PROMPTS."""
    sequences = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def row(batch, index):
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


def test_what_is_not_routed_keeps_every_bit(model, adapters, batch):
    before = logits(model, batch)
    with Port(model) as port:
        assert torch.equal(logits(model, batch), before)
        port.plug("code", adapters["code"])
        assert torch.equal(logits(model, batch), before)
        port.route(["base", "code", "base"])
        after = logits(model, batch)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])
        port.route({"code": 0.0})
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), before)


def test_each_row_takes_its_own_expert(port, model, batch):
    names = ["docs", "code", "law"]
    apart = []
    for index, name in enumerate(names):
        port.route(name)
        apart.append(logits(model, batch)[index])
    port.route(names)
    torch.testing.assert_close(logits(model, batch), torch.stack(apart), rtol=1e-5, atol=1e-5)
    port.route(lambda prompt: "code" if "def" in prompt else "base", PROMPTS)
    torch.testing.assert_close(logits(model, batch)[1], apart[1], rtol=1e-5, atol=1e-5)


def test_a_mixture_adds_up_the_changes(port, model, adapters, batch):
    base, change = logits(model, batch), {}
    for name in adapters:
        port.route(name)
        change[name] = logits(model, batch) - base
    port.route([{"code": 0.7, "docs": 0.3}, {"docs": 1.0, "law": -0.5}, {"code": 0.5, "base": 0.5}])
    found = logits(model, batch) - base
    wanted = 0.7 * change["code"] + 0.3 * change["docs"], change["docs"] - 0.5 * change["law"], 0.5 * change["code"]
    for index, each in enumerate(wanted):
        torch.testing.assert_close(found[index], each[index], rtol=1e-4, atol=1e-4)
    both = combine([(0.7, adapters["code"]), (0.3, adapters["docs"])])
    assert both.rank == 11 and both.config.expert == "0.7 expert 1 + 0.3 expert 2"


HEADS = {
    "llama": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},  # soft-capped
    "cohere": {},  # scaled
    "gpt2": {},
}


@pytest.mark.parametrize("name", HEADS)
def test_beams_and_samples_of_a_request_keep_its_expert(name, tiny_lm, adapters, batch):
    """A batch with three routes gives what each request gives alone, greedy, with beams and with several samples."""
    model = tiny_lm(name.split()[0], **HEADS[name])
    routes = ["code", {"code": 0.6, "docs": 0.4}, "base"]
    with Port(model) as port:
        for each in ("code", "docs"):
            port.plug(each, adapters[each])
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}):
            port.route(routes)
            together = model.generate(**batch, **GREEDY | options).view(3, -1)
            for index, route in enumerate(routes):
                port.route(route)
                alone = model.generate(**row(batch, index), **GREEDY | options).view(-1)
                assert torch.equal(together[index], alone)
        port.route(routes)
        greedy = model.generate(**batch, **GREEDY)
        drawn = model.generate(**batch, **GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2})
        assert torch.equal(drawn, greedy.repeat_interleave(2, 0))


def test_soft_caps_come_after_the_change(tiny_lm, adapters, batch):
    model = tiny_lm("gemma2")
    with Port(model) as port:
        port.plug("code", random_adapter(1, size=20.0)).route("code")
        assert logits(model, batch).abs().max() <= 3.0


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_and_compiled_forwards_give_the_same_text(cache, tiny_lm, adapters, batch):
    model = tiny_lm("llama", tie_word_embeddings=False, num_hidden_layers=1)
    port = Port(model)
    for name in ("code", "docs"):
        port.plug(name, adapters[name])
    port.route(["code", {"code": 0.6, "docs": 0.4}, "base"])
    wanted = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation=cache), wanted)
    if cache == "static":
        forward = model.forward
        model.forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
        compiled = model.generate(**batch, **GREEDY, cache_implementation=cache)
        port.route(["base", "code", "docs"])
        swapped = model.generate(**batch, **GREEDY, cache_implementation=cache)
        model.forward = forward
        assert torch.equal(compiled, wanted) and torch.equal(swapped, model.generate(**batch, **GREEDY))


class SwapAt(LogitsProcessor):
    """Calls `swap` once `length` tokens are there: between two steps of a running generate."""

    def __init__(self, length, swap):
        self.length, self.swap = length, swap

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.swap()
        return scores


def test_an_adapter_is_swapped_between_two_steps_of_a_running_generate(port, model, adapters, batch):
    alone = row(batch, 1)
    start = alone["input_ids"].shape[1]
    port.route("code")
    first = model.generate(**alone, **GREEDY | {"max_new_tokens": 3})
    port.route("docs")
    mask = torch.ones_like(first)
    wanted = model.generate(input_ids=first, attention_mask=mask, **GREEDY | {"max_new_tokens": 5})
    for swap in (lambda: port.route("docs"), lambda: port.plug("code", adapters["docs"])):
        port.plug("code", adapters["code"]).route("code")
        processors = LogitsProcessorList([SwapAt(start + 2, swap)])
        assert torch.equal(model.generate(**alone, **GREEDY, logits_processor=processors), wanted)


def test_half_precision_bases_keep_their_dtype(tiny_lm, adapters, batch):
    model = tiny_lm("llama", tie_word_embeddings=False)
    with Port(model) as port:
        port.plug("code", adapters["code"]).route("code")
        wanted = logits(model, batch)
        model.to(torch.bfloat16)
        found = logits(model, batch)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_surprise_is_the_loss_of_each_and_auto_takes_the_lowest(port, model, adapters, tiny_tokenizer):
    ids = tiny_tokenizer(PROMPTS[1] * 3, return_tensors="pt")["input_ids"]
    found = surprise(model, inspect_head(model), adapters, ids)
    for name in ("base", *adapters):
        port.route(name)
        with torch.no_grad():
            assert found[name] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
    assert least_surprised(found) == min(found, key=found.get) and list(found)[0] == "base"
    assert least_surprised(surprise(model, inspect_head_of_base(port, model), adapters, ids[:, :1])) == "base"


def inspect_head_of_base(port, model):
    port.route("base")
    return inspect_head(model)


def test_surprise_over_many_tiles_is_the_same(port, model, adapters, tiny_tokenizer, monkeypatch):
    ids = tiny_tokenizer(PROMPTS[1] * 3, return_tensors="pt")["input_ids"]
    whole = surprise(model, inspect_head(model), adapters, ids)
    monkeypatch.setattr("chassis.routing.TILE", 3)
    assert surprise(model, inspect_head(model), adapters, ids) == pytest.approx(whole, rel=1e-5)


def test_names_routes_and_batches_that_do_not_fit_are_refused(port, model, adapters, batch):
    for wrong, message in (
        (lambda: port.route("cod"), "no adapter 'cod' is plugged: did you mean 'code'"),
        (lambda: port.route({"code": 1, "dogs": 1}), "did you mean 'docs'"),
        (lambda: port.route(str.upper), "give the prompts too"),
        (lambda: port.route([]), "no routes"),
        (lambda: port.route({"code": float("nan")}), "expected one or more finite numbers"),
        (lambda: port.plug("base", adapters["code"]), "adapter name 'base'"),
        (lambda: port.plug("a=b", adapters["code"]), "adapter name 'a=b'"),
        (lambda: port.unplug("code2"), "did you mean 'code'"),
        (lambda: Port(model), "attached to this model already"),
        (lambda: parse_route("code=x"), "route 'code=x'"),
        (lambda: parse_route("code=1,code=2"), "expected a name, or weights"),
    ):
        with pytest.raises(ChassisError, match=message):
            wrong()
    port.route("code")
    with pytest.raises(ChassisError, match="'code' is routed: route elsewhere first"):
        port.unplug("code")
    assert port.unplug("law") is adapters["law"]
    port.route(["code", "base"])
    with pytest.raises(ChassisError, match="2 requests are routed and the batch has 3 rows"):
        logits(model, batch)


def test_numbers_that_are_not_finite_are_named(port, model, adapters, tiny_tokenizer):
    broken = random_adapter(4)
    broken.V[0, 0] = torch.inf
    with pytest.raises(ChassisError, match="NaN or infinite values in V"):
        port.plug("broken", broken)
    ids = tiny_tokenizer(PROMPTS[0])["input_ids"]
    with pytest.raises(ChassisError, match="logits of 'broken' are NaN or infinite"):
        surprise(model, inspect_head(model), {"broken": broken}, torch.tensor(ids))
