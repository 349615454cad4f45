"""How well a model predicts a text, and how far a quantised model has moved from its original.

    found = npmix.evaluate("tiny-q4", text, against="tiny_mixtral", kv="f32")
    found["perplexity"]["value"], found["kl"]["mean"]["value"], found["kl"]["mean"]["standard_error"]

One hard fact: a KL divergence sees ten times smaller changes than a perplexity does, because it compares all of two
distributions at every position and not one number of each.

`windows` says which tokens are computed together and scored, `scores` does the arithmetic, `logits_file` keeps a base's
log-probabilities on disk, `measure` runs the models.
"""

from .logits_file import LogitsReader, LogitsWriter
from .measure import evaluate, run_windows, text_ids
from .scores import Block, Scores, score
from .windows import Plan, Window, make_plan

__all__ = [
    "Block",
    "LogitsReader",
    "LogitsWriter",
    "Plan",
    "Scores",
    "Window",
    "evaluate",
    "make_plan",
    "run_windows",
    "score",
    "text_ids",
]
