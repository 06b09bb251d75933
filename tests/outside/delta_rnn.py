"""Delta RNN (arXiv 2106.06295), a rule from outside the table with a state of its own (W, R, y) and no lowered form.

y_t = W_tᵀ q_t + R_tᵀ softmax(y_{t−1}). The delta rule writes W with k, v, beta and R with k_r, v_r, beta_r.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

import fwp
from fwp.rules.reference import delta, retrieve


def init(batch, K, V, like):
    return like.new_zeros(*batch, K, V), like.new_zeros(*batch, V, V), like.new_zeros(*batch, V)


def step(state, k, v, beta, k_r, v_r, beta_r):
    W, R, y = state
    return delta(W, k, v, beta), delta(R, k_r, v_r, beta_r), y


def read(state, q):
    W, R, y = state
    y = retrieve(W, q) + retrieve(R, y.softmax(-1))
    return y, (W, R, y)


def normal(size, generator):
    return torch.randn(size, generator=generator, dtype=torch.float64)


unit = partial(F.normalize, dim=-1)
RATE = fwp.Gate("BTH", 0, 2, torch.sigmoid, lambda *args: normal(*args).sigmoid())
KEY = fwp.Gate("BTHV", -math.inf, math.inf, unit, lambda *args: unit(normal(*args)))
VALUE = fwp.Gate("BTHV", -math.inf, math.inf, torch.clone, normal)
GATES = {"beta": RATE, "k_r": KEY, "v_r": VALUE, "beta_r": RATE}
DELTA_RNN = fwp.Rule("delta_rnn", step=step, gates=GATES, init=init, read=read, erases=True, linear_in_v=False)
