"""The training loop of the bundled model: constant learning rate, then a linear decay to zero that can be asked for at any time.

Hard fact: nobody knows beforehand how much of the machine a background job gets. So the schedule has no step budget: it runs at the full
rate until `minutes` of its own active time are nearly over or a file DECAY appears, whose text is the minutes (from its writing) in which
the rate falls to zero. A paused process (SIGSTOP) loses nothing but time.
"""

import os
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import tiny_model

BATCH = 8192  # tokens a step
MUON_RATE, ADAM_RATE = 5e-3, 3e-3
WARMUP = 100  # steps
CLIP = 1.0
DONE = 1e-3  # of the peak learning rate: less changes nothing
DECAY_SHARE = 0.25  # of `minutes`, when no DECAY file comes first
DECAY_LENGTH = 2048  # sequences of the decay phase: every rotary position of the context must have been seen in training
SPLIT_SHARE = 0.15  # of the files come, in an epoch, as one document per top-level definition: prompts begin with "def", files do not


class Data:
    """The training files in a new random order each epoch, cut into sequences. Its whole state is (epoch, offset).

    A file is a pair of token tensors: as one document, and split into several.
    """

    def __init__(self, files, epoch=0, offset=0):
        self.files, self.epoch, self.offset = files, epoch, offset
        self._shuffle()

    def _shuffle(self):
        chance, files = random.Random(self.epoch), list(self.files)
        chance.shuffle(files)
        self.stream = torch.cat([split if chance.random() < SPLIT_SHARE else whole for whole, split in files])

    def take(self, length):
        if self.offset + BATCH + 1 > len(self.stream):
            self.epoch, self.offset = self.epoch + 1, 0
            self._shuffle()
        piece = self.stream[self.offset : self.offset + BATCH + 1].long()
        self.offset += BATCH
        return piece[:-1].view(-1, length), piece[1:].view(-1, length)


def losses(model, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=x, use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(out.logits.float().view(-1, out.logits.shape[-1]), y.reshape(-1))
    config = model.config
    return loss, tiny_model.balance_loss(out.router_logits, config.num_local_experts, config.num_experts_per_tok)


def weights_at(work, step):
    """Where the weights of a step of the curve are kept."""
    return Path(work) / f"weights-{step:06}.pt"


class Trainer:
    def __init__(self, work, files, again=False, compiled=True):
        self.work = Path(work)
        self.model = tiny_model.make_model()
        self.model.train()
        self.optimisers = tiny_model.make_optimisers(self.model)
        self.data = Data(files)
        self.step = self.tokens = 0
        self.elapsed = 0.0
        self.factor = 1.0  # of the peak learning rate
        self.recent = []  # durations of the last steps
        self.losses = torch.compile(losses, dynamic=False) if compiled else losses
        if self.checkpoint.exists():
            self.restore()
        if again and self.factor < DONE:
            self.asked.unlink(missing_ok=True)
            self.factor = 1.0

    @property
    def checkpoint(self):
        return self.work / "checkpoint.pt"

    @property
    def asked(self):
        return self.work / "DECAY"

    def restore(self):
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        self.data = Data(self.data.files, *state["data"])
        self.step, self.tokens, self.elapsed, self.factor = (state[k] for k in ("step", "tokens", "elapsed", "factor"))
        if state.get("left"):  # the decay had begun: it keeps the time that it had left, however long ago that was
            self.asked.write_text(f"{state['left'] / 60:.2f}\n")

    def save(self, end):
        state = {k: getattr(self, k) for k in ("step", "tokens", "elapsed", "factor")}
        state["left"] = 0.0 if end is None else max(1.0, end - time.time())
        state["data"] = (self.data.epoch, self.data.offset)
        state["model"] = self.model.state_dict()
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)
        torch.save(state["model"], weights_at(self.work, self.step))

    def decay_end(self, minutes):
        """The wall-clock time at which the rate reaches zero, or None before the decay has begun."""
        if not self.asked.exists() and self.elapsed >= 60 * minutes * (1 - DECAY_SHARE):
            self.asked.write_text(f"{minutes * DECAY_SHARE:.1f}\n")
        try:
            return self.asked.stat().st_mtime + 60 * float(self.asked.read_text())
        except (OSError, ValueError):
            return None

    def train_step(self, length):
        """One batch; returns its loss. The step's own duration, with pauses capped, is what counts as elapsed."""
        begin = time.monotonic()
        warm = min(1.0, (self.step + 1) / WARMUP)
        for optimiser, rate in zip(self.optimisers, (MUON_RATE, ADAM_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = rate * warm * self.factor
        x, y = self.data.take(length)
        loss, balance = self.losses(self.model, x, y)
        (loss + self.model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        self.step += 1
        self.tokens += BATCH
        taken = time.monotonic() - begin
        if self.recent:
            taken = min(taken, 5 * statistics.median(self.recent))
        self.recent = self.recent[-50:] + [taken]
        self.elapsed += taken
        return loss.item(), balance.item(), taken

    def run(self, minutes, length, bits, save_every=300.0):
        """Trains until the decay has ended; `bits(model)` measures the held-out bits per byte for the curve."""
        curve = self.work / "curve.tsv"
        if not curve.exists():
            curve.write_text("elapsed_s\tstep\ttokens\trate\ttrain_loss\tbalance\theld_bits_per_byte\n")
        saved, sums = self.elapsed, []
        while self.factor >= DONE:
            end = self.decay_end(minutes)
            loss, balance, taken = self.train_step(length if end is None else DECAY_LENGTH)
            sums.append((loss, balance))
            if end is not None:  # straight to zero from wherever it stands, also when the file was rewritten or time was lost
                self.factor *= max(0.0, 1 - taken / max(end - time.time() + taken, 1e-9))
            if self.step % 20 == 0:
                print(
                    f"{self.elapsed:8.0f} s  step {self.step}  loss {loss:.4f}  balance {balance:.3f}  "
                    f"{BATCH / taken:6.0f} tokens/s  rate x {self.factor:.3f}",
                    flush=True,
                )
            if self.factor < DONE or self.elapsed - saved >= save_every:
                held = bits(self.model)
                means = [statistics.fmean(column) for column in zip(*sums)]
                with curve.open("a") as file:
                    file.write(
                        f"{self.elapsed:.0f}\t{self.step}\t{self.tokens}\t{self.factor:.4f}\t{means[0]:.4f}\t{means[1]:.4f}\t{held:.4f}\n"
                    )
                self.save(end)
                saved, sums = self.elapsed, []
