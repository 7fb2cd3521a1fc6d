"""The bridge between any two tokenizers: see `bridge.py` for how it is used."""

from chassis.bridge.bridge import Bridge
from chassis.bridge.em import likeliest
from chassis.bridge.lookahead import lookahead
from chassis.bridge.plan import Plan
from chassis.bridge.states import ExpertStates, tree_logits
from chassis.bridge.tree import Tree
from chassis.bridge.windows import TextWindow, text_windows

__all__ = ["Bridge", "ExpertStates", "Plan", "TextWindow", "Tree", "likeliest", "lookahead", "text_windows", "tree_logits"]
