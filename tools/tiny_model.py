"""The bundled model's shape, its Muon optimiser, and attention and experts functions fit for training on a CPU.

Hard fact: torch's CPU flash attention trains at a third of what blocks of plain matmuls reach, and attention was a third of the step.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCAB = 2048
CONTEXT = 2048


class _Permute(torch.autograd.Function):
    """Rows in another order: the backward of a permutation is the inverse gather, far cheaper than index_add."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


@torch.compiler.disable
def sorted_experts(self, hidden_states, top_k_index, top_k_weights):
    """(T, D), (T, A), (T, A) -> (T, D): every (token, choice) pair sorted by expert, one matmul per expert and matrix."""
    tokens, dim = hidden_states.shape
    active = top_k_index.shape[1]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    flat = top_k_index.reshape(-1)  # (T*A,)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    pairs = hidden_states.to(dtype).unsqueeze(1).expand(tokens, active, dim).reshape(-1, dim)
    rows = _Permute.apply(pairs, order, inverse)
    gate_up, down = self.gate_up_proj.to(dtype).unbind(0), self.down_proj.to(dtype).unbind(0)
    made = []
    for expert, part in enumerate(rows.split(counts)):
        gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
        made.append(F.linear(F.silu(gate) * up, down[expert]))
    out = _Permute.apply(torch.cat(made), inverse, order).view(tokens, active, dim)
    return torch.bmm(top_k_weights.to(dtype).unsqueeze(1), out).squeeze(1).to(hidden_states.dtype)


def blocked_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention over whole sequences, a block of queries at a time against the keys up to it. Query heads that share a key head
    become rows of one matmul, so keys are never repeated. (B, H, T, d), (B, K, T, d) x 2 -> (B, T, H, d)"""
    batch, heads, length, dim = query.shape
    shared = key.shape[1]
    group, block = heads // shared, 128 if length <= 512 else 256
    query = query.reshape(batch, shared, group, length, dim) * scaling
    out = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        rows = query[:, :, :, begin:end].reshape(batch * shared, group * (end - begin), dim)
        scores = rows @ key[:, :, :end].reshape(batch * shared, end, dim).mT
        scores = scores.view(batch * shared, group, end - begin, end).float()
        hidden = torch.arange(end)[None] > torch.arange(begin, end)[:, None]
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(value.dtype)
        made = probs.view(batch * shared, group * (end - begin), end) @ value[:, :, :end].reshape(batch * shared, end, dim)
        out.append(made.view(batch, shared, group, end - begin, dim))
    return torch.cat(out, 3).view(batch, heads, length, dim).transpose(1, 2), None


ALL_EXPERTS_FUNCTIONS["sorted"] = sorted_experts
ALL_ATTENTION_FUNCTIONS["blocked"] = blocked_attention


def make_config():
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=True,
    )


def set_forms(model, attention, experts):
    before = model.config._attn_implementation, model.config._experts_implementation
    model.config._attn_implementation, model.config._experts_implementation = attention, experts
    return before


@contextlib.contextmanager
def training_forms(model):
    """Attention and experts as in training for whole sequences; outside, transformers' own, which know a KV cache."""
    before = set_forms(model, "blocked", "sorted")
    yield
    set_forms(model, *before)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = MixtralForCausalLM(make_config())
    set_forms(model, "blocked", "sorted")
    weights = sum(p.numel() for p in model.parameters())
    if weights > 8_400_000:
        raise SystemExit(f"{weights:,} weights: more than the bundled model may have")
    return model


def balance_loss(router_logits, experts, active):
    """Switch Transformer's load-balancing loss, averaged over the layers (each layer balanced by itself: transformers' own sums the
    layers' counts first, which lets one layer's imbalance hide another's)."""
    total = 0.0
    for logits in router_logits:
        probs = logits.float().softmax(-1)  # (T, E)
        chosen = F.one_hot(probs.topk(active, dim=-1).indices, experts).float().sum(1).mean(0)  # (E,)
        total = total + experts * (chosen * probs.mean(0)).sum() / active
    return total / len(router_logits)


def orthogonalise(batch, steps=5):
    """Newton-Schulz (Muon's quintic): (N, rows, columns) to the nearest matrices with singular values near 1."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.bfloat16()
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices, experts' fused 3-D weights included: each 256-row block of gate_up is a matrix of its own."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                moment = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(moment, group["momentum"]).view(-1, min(256, p.shape[-2]), p.shape[-1])
                by_shape.setdefault(update.shape[1:], []).append((p, update))
            for (rows, columns), found in by_shape.items():
                made = orthogonalise(torch.cat([update for _, update in found])).float()
                scale = 0.2 * max(rows, columns) ** 0.5  # the update's RMS then equals AdamW's, so one learning rate serves both
                for (p, update), piece in zip(found, made.split([len(update) for _, update in found])):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(piece.reshape(p.shape), alpha=-group["lr"] * scale)


def make_optimisers(model, lr=2e-3, weight_decay=0.1):
    """Muon for attention and experts, AdamW for embeddings, head, router and norms. Learning rates are set by the schedule."""
    hidden, tables, norms = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 1:
            norms.append(p)
        elif "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight"):
            tables.append(p)
        else:
            hidden.append(p)
    adam = torch.optim.AdamW(
        [{"params": tables, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98), fused=True
    )
    return [Muon(hidden, lr=lr, weight_decay=weight_decay), adam]
