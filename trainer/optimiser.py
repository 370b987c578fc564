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

    The matrices of linear layers decay; tables and biases hold counts and do not. A module may have
    a `rate_factor`: its parameters learn so many times as fast as the others.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    factor: dict[int, float] = {}
    for m in model.modules():
        if times := getattr(type(m), "rate_factor", None):
            factor |= dict.fromkeys(map(id, m.parameters()), float(times))
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            parts.setdefault((factor.get(id(p), 1.0), id(p) in linear), []).append(p)
    groups = [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "rate_factor": times,
        }
        for (times, decays), parameters in parts.items()
    ]
    return torch.optim.AdamW(groups, fused=True, betas=BETAS)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The next step is taken at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate_factor"]


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
