"""Log-probabilities, their KL divergence, and the figures drawn from them, all in float64.

One hard fact: divergences of interest are as small as 1e-4 and logits are float32 of size 20, so nothing here is computed
in less than float64: rounding then stays below 1e-12.
"""

import math
from dataclasses import dataclass, field

import numpy as np

PERCENTS = (90, 95, 99, 99.9)


@dataclass(frozen=True)
class Block:
    """Some positions as one model sees them. logs: natural log-probabilities (n, V). nll: minus those of the tokens that
    came (n,), in nats. top: the likeliest token (n,)."""

    logs: np.ndarray
    nll: np.ndarray
    top: np.ndarray


def score(rows: np.ndarray, targets) -> Block:
    """float32 logits (n, V) and the n tokens that came -> Block."""
    logs = normalised(rows.astype(np.float64))
    return Block(logs, -logs[np.arange(len(rows)), targets], rows.argmax(-1))


def normalised(logs: np.ndarray) -> np.ndarray:
    """logs - ln(sum(exp(logs))) of each row, in place."""
    logs -= logs.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    return logs


def divergences(base: Block, model: Block) -> np.ndarray:
    """KL(base || model) = sum over the vocabulary of p (ln p - ln q), nats (n,)."""
    return (np.exp(base.logs) * (base.logs - model.logs)).sum(-1)


def mean(values: np.ndarray) -> tuple[float, float | None]:
    """(mean, its standard error as llama.cpp has it: sqrt((<x^2> - <x>^2) / (n - 1)); None for n = 1).

    It takes positions for independent; neighbours in a text are not quite, so the true error is somewhat larger.
    """
    middle, count = float(values.mean()), len(values)
    return middle, math.sqrt(float(((values - middle) ** 2).mean()) / (count - 1)) if count > 1 else None


@dataclass
class Scores:
    """What is kept of every scored position: four numbers and a weight, as lists of arrays; `column` joins one."""

    guide_weight: list = field(default_factory=list)
    nll: list = field(default_factory=list)
    base_nll: list = field(default_factory=list)
    kl: list = field(default_factory=list)
    same: list = field(default_factory=list)

    def add(self, guide_weight: float, model: Block, base: Block | None) -> None:
        """Take in a block."""
        self.guide_weight.append(np.full(len(model.nll), guide_weight))
        self.nll.append(model.nll)
        if base is not None:
            self.base_nll.append(base.nll)
            self.kl.append(divergences(base, model))
            self.same.append(base.top == model.top)

    def column(self, name: str) -> np.ndarray:
        """The "nll", "base_nll", "kl" (nats), "same" (bool) or "guide_weight" of all positions in the order of the text."""
        return np.concatenate(getattr(self, name))

    def figures(self, strided: bool) -> dict:
        """All of them, as `evaluate` tells."""
        nll = self.column("nll")
        found = {"scored": len(nll), **_perplexity("perplexity", "log_perplexity", *mean(nll))}
        if strided:
            weights = self.column("guide_weight")
            found["guide_perplexity"] = _power(float((weights * nll).sum() / weights.sum())) if weights.any() else None
        if not self.base_nll:
            return found
        base, kl, same = map(self.column, ("base_nll", "kl", "same"))
        found["base"] = _perplexity("perplexity", "log_perplexity", *mean(base))
        # paired: the error of the mean difference is sqrt(var + var - 2 cov)
        found |= _perplexity("perplexity_ratio", "log_perplexity_ratio", *mean(nll - base))
        found["kl"] = {"mean": _figure(*mean(kl)), "median": float(np.median(kl))}
        found["kl"] |= {f"percentile_{p:g}": float(np.percentile(kl, p)) for p in PERCENTS}
        found["kl"]["largest"] = float(kl.max())
        found["same_top"] = _figure(*mean(same.astype(np.float64)))
        return found


def _figure(value: float, error: float | None) -> dict:
    return {"value": value, "standard_error": error}


def _perplexity(name: str, log_name: str, value: float, error: float | None) -> dict:
    """e^value, whose error is e^value times that of value."""
    power = _power(value)
    return {name: _figure(power, None if error is None or power is None else power * error), log_name: _figure(value, error)}


def _power(value: float) -> float | None:
    """e^value; None where that is beyond float64 (JSON has no infinity)."""
    return math.exp(value) if value < 709 else None
