"""Several texts in one row of tokens, with branches: the states are those of each path read by itself."""

from unittest import mock

import pytest
import torch
from chassis.bridge.packed import PackedStates, packs
from chassis.models import final_states
from chassis.models.forward import forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ARCHITECTURES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "cohere": {},
    "qwen3": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
}
TEXTS = [[5, 6, 7, 8, 9], [5], [6, 8, 10, 12]]
BRANCHES = [(0, 2, 20), (0, 5, 21), (2, 1, 22)]  # text, tokens of it before, token


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_states_are_those_of_each_path_alone(tiny_lm, architecture):
    model = tiny_lm(architecture, **ARCHITECTURES[architecture])
    assert packs(model)
    states, sizes = PackedStates(model, len(TEXTS), 9), [torch.tensor(n) for n in ((5, 1, 4), (2, 0, 1), (1, 0, 1))]
    found = [states.run(torch.tensor(sum(TEXTS, [])), torch.cat([torch.arange(len(text)) for text in TEXTS]), sizes[0])]

    attends = torch.zeros(3, 7, dtype=torch.bool)  # in text 0 the branches are its tokens 5 and 6, in text 2 its token 4
    for row, (own, (_, before, _)) in enumerate(zip((5, 6, 4), BRANCHES, strict=True)):
        attends[row, :before] = attends[row, own] = True
    found.append(states.run(torch.tensor([20, 21, 22]), torch.tensor([2, 5, 1]), sizes[1], attends))

    deeper = torch.zeros(2, 8, dtype=torch.bool)
    deeper[0, [0, 1, 5, 7]] = deeper[1, [0, 4, 5]] = True
    found.append(states.run(torch.tensor([23, 24]), torch.tensor([3, 2]), sizes[2], deeper))

    paths = [text[: i + 1] for text in TEXTS for i in range(len(text))]
    paths += [[*TEXTS[text][:before], token] for text, before, token in BRANCHES]
    paths += [[5, 6, 20, 23], [6, 22, 24]]
    for path, state in zip(paths, torch.cat(found), strict=True):
        ids = torch.tensor([path])
        with torch.no_grad():
            alone = final_states(model, lambda ids=ids: forward(model, ids, torch.ones_like(ids)))[0, -1]
        assert torch.allclose(state, alone, atol=1e-5)


def test_models_with_an_attention_of_their_own_are_told(tiny_lm):
    model = tiny_lm("llama")
    model.config._attn_implementation = "eager"
    assert not packs(model)
    model.config._attn_implementation = "sdpa"
    assert packs(model) and model.config._attn_implementation == "sdpa"
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output + output.mean(1, keepdim=True))
    assert not packs(model)  # tokens also mix outside attention


@pytest.mark.parametrize("option", ["position_bias", "softcap"])
def test_attention_that_does_more_is_not_packed(tiny_lm, option):
    """As in T5 and Gemma 2: a small value, which no comparison of states could tell."""
    model = tiny_lm("llama")
    value = {"position_bias": torch.full((1, 1, 8, 8), 1e-9), "softcap": 1e9}[option]

    def with_option(module, args, kwargs):
        return args, kwargs | {option: value}

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(with_option, with_kwargs=True)
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, sdpa=without_softcap):
        assert not packs(model)
    hook.remove()
    assert packs(model)


def without_softcap(*args, softcap=None, **options):
    """transformers' own refuses one."""
    return sdpa_attention_forward(*args, **options)
