"""How weights change in a step: AdamW, and a learning rate that rises and falls."""

import math

import torch
from torch import nn

# Share of all steps over which the learning rate rises from 0.
WARM_UP = 0.05
# Learning rate at the end, relative to its peak.
FINAL_RATE = 0.02
# Share of the peak that the very first step gets: a rate of 0 would waste it.
FIRST_SHARE = 1e-3
# How far back the means of a gradient and of its square reach.
BETAS = (0.9, 0.98)


def new_optimiser(model: nn.Module, *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters.

    The matrices of linear layers decay; tables and biases hold counts and do not.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in linear], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, betas=BETAS)


def relative_rate(done: float) -> float:
    """Learning rate relative to its peak, by the share of the training that is over.

    A linear rise, then half a cosine down.

    >>> relative_rate(0.05)
    1.0
    >>> round(relative_rate(1.0), 3)
    0.02
    """
    if done < WARM_UP:
        return max(done, FIRST_SHARE) / WARM_UP
    wave = 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
    return FINAL_RATE + (1 - FINAL_RATE) * wave
