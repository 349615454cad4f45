"""The columns of the two int64 tables through which Python tells kernels where everything lies.

One hard fact: compiled code has no bounds checks, so whoever fills a table has checked every number.

`m` (machine): sizes, slots and the addresses of the run state's buffers (their shapes: `model/state.py`).
`layers`: a row a layer; a matrix is two columns, its address and its slot; experts follow from EXPERTS on,
three addresses each (w_gate, w_up, w_down).
A slot (0..3) is one of the at most four (format, group) pairs of a model.
"""

from numpy import int64 as _int64  # Numba compiles a callee anew for each literal argument; a typed number is none

SLOTS = 4
# whose experts decode guesses: 1, 2 and 3 keep a disk of 2.6 GB/s busy 88, 93 and 95 % of the time with half of Mixtral's in memory
LAYERS_AHEAD = 3

# GROUP_s: inputs per scale of slot s, SPAN_s: bytes of a pair of groups of 16 rows, both 0 for a dense one. NUMBERS: float32 norm_eps, query scale.
(
    DIM, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, HIDDEN_DIM, N_EXPERTS, N_ACTIVE, VOCAB, WINDOW,
    X_WIDTH, Q_WIDTH, KV_WIDTH, V_WIDTH, ATT_WIDTH,
    GROUP_0, GROUP_1, GROUP_2, GROUP_3, SPAN_0, SPAN_1, SPAN_2, SPAN_3,
    CAPACITY, CHUNK, KEYS_HEAD_BYTES, VALUES_HEAD_BYTES,
    EMBEDDINGS, NORM, OUTPUT, OUTPUT_SLOT,
    NUMBERS, ROPE, KEYS, VALUES,
    X, QKV, Q, ATT, ROWS, ACTS, H_ACTS, Y, PARTS,
    TOKENS, CHOICE, CHOICE_WEIGHT, ORDER, RANK, STARTS,
    SCRATCH, SCRATCH_BYTES, S_ROW, S_ACT, S_GATE, S_UP, S_LOGITS, S_CHOICE, S_SCORES, S_PARTS, S_RUNNING, S_PANEL,
    COUNTERS, TEAM, CLOCKS, STATUS,
) = map(_int64, range(66))  # fmt: skip
# what calibration keeps of a layer's inputs as float32 rows, or 0: see `observe.py`
OBSERVED_NORMED, OBSERVED_ROWS, OBSERVED_HIDDEN = range(STATUS + 1, STATUS + 4)
# SELECTED: int32 (N_EXPERTS): which experts (prefill), or which of a token's (decode), to compute. GUESS: int32 (2, CHUNK + LAYERS_AHEAD,
# N_ACTIVE): the experts that each token of a prompt would choose with the next layer's router, or that one token would choose with those of
# the next layers; then room for their weights
SELECTED, GUESS = range(OBSERVED_HIDDEN + 1, OBSERVED_HIDDEN + 3)
MACHINE_COLUMNS = GUESS + 1

# A layer may be done in parts, so that experts can be read meanwhile: an int64, 0 for the whole, or ROUTE alone (all before the experts), or
# PART * the number of experts in SELECTED with GATE_UP and DOWN (in decode also one after the other), and SUM in the last such call. The bits
# are the same.
ROUTE, GATE_UP, DOWN, SUM, PART = 1, 2, 4, 8, 16

(
    ATTENTION_NORM, FFN_NORM, WQ, WQ_SLOT, WK, WK_SLOT, WV, WV_SLOT, WO, WO_SLOT, ROUTER, ROUTER_SLOT, GATE_SLOT, DOWN_SLOT, EXPERTS,
) = range(15)  # fmt: skip

# STATUS: int64 cells that kernels set and the engine reads
BAD_LAYER = 0  # byte offset: the first layer, from 1, whose output is not finite; -1 the embeddings; N_LAYERS + 1 the logits; 0 none
SATURATED = 8  # byte offset: whether a float16 cache write was saturated

# COUNTERS: one cache line a phase of dynamic work
COUNT_QKV, COUNT_ATTENTION, COUNT_OUT, COUNT_GATE, COUNT_DOWN, COUNT_LOGITS = (_int64(64 * i) for i in range(6))
COUNTERS_BYTES = 6 * 64

# CLOCKS: int64 processor ticks that member 0 spent in each phase, the wait for the others included; cell 0: the last tick read
PHASES = ("embed", "norm", "qkv", "rope", "attention", "merge", "wo", "route", "sort", "pack", "gate_up", "down", "sum", "head")
(
    T_EMBED, T_NORM, T_QKV, T_ROPE, T_ATTENTION, T_MERGE, T_WO, T_ROUTE, T_SORT, T_PACK, T_GATE_UP, T_DOWN, T_SUM, T_HEAD,
) = map(_int64, range(1, 15))  # fmt: skip
