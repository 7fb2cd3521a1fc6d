"""NaN logits end a generation with the prompt and the token they belong to."""

import pytest
import torch
from chassis.errors import ChassisError
from chassis.finite import FiniteLogits
from chassis.results import continuation

PROMPTS = ["the quick brown", "def x return class", "fox"]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model(tiny_lm):
    return tiny_lm("llama", tie_word_embeddings=False)


def damage(model, token):
    """NaN where the model reads `token`, and nowhere before."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan


def generated(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist(), ids[0].tolist()


def test_the_token_after_a_damaged_one_is_named(model, tiny_tokenizer):
    said, read = generated(model, tiny_tokenizer, PROMPTS[0])
    step = next(i for i, token in enumerate(said) if i and token not in read + said[:i])
    damage(model, said[step])
    with pytest.raises(ChassisError, match=f"logits for token {step + 2} after 'the quick brown' are NaN or infinite"):
        continuation(model, tiny_tokenizer, PROMPTS[0], 8, eos_token_id=None)
    assert continuation(model, tiny_tokenizer, PROMPTS[0], step + 1, eos_token_id=None)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_of_a_batch_the_prompt_is_named(options, model, tiny_tokenizer):
    sequences = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    damage(model, next(token for token in sequences[1] if token not in sequences[0] + sequences[2]))
    finite = FiniteLogits(PROMPTS, start=width)
    with pytest.raises(ChassisError, match="logits for token 1 after 'def x return class' are"):
        model.generate(ids, attention_mask=mask, logits_processor=[finite], **GREEDY | options)


def test_what_is_ruled_out_is_no_error_unless_nothing_is_left():
    finite, ids = FiniteLogits(["a", "b"], start=3), torch.zeros(4, 5, dtype=torch.int64)
    scores = torch.full((4, 6), -torch.inf)
    scores[:, 2] = 1.0
    assert finite(ids, scores) is scores
    for row, value, name in ((1, -torch.inf, "a"), (2, torch.inf, "b"), (3, torch.nan, "b")):
        wrong = scores.clone()
        wrong[row, 2] = value
        with pytest.raises(ChassisError, match=f"token 3 after '{name}'"):
            finite(ids, wrong)
