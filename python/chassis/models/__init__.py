"""Causal language models: load one safely, find its parts, read its hidden states."""

from chassis.models.capture import Captured, capture, final_states
from chassis.models.head import Head, inspect_head
from chassis.models.loading import load_causal_lm, load_tokenizer, located, vocabulary_hash

__all__ = [
    "Captured",
    "Head",
    "capture",
    "final_states",
    "inspect_head",
    "load_causal_lm",
    "load_tokenizer",
    "located",
    "vocabulary_hash",
]
