"""What the model and the live sources weigh: likelihood finds the shape, NDCG how much of it.

The window is newer than anything the model was fitted on, so that the model's share of new items is
judged as it will be in service. Constant weights come first, by expectation-maximisation with a few
made-up events that say `UNTUNED_WEIGHTS`; from there the linear map is fitted, if the window is
long enough to say something about it.

Likelihood wants every event named somewhere, which is not what a list of ten is for: where the
model ranks well, it mixes in more of what is popular than ranks best, and where it ranks badly,
more of the model. So the odds of the sources are then multiplied with a factor, and the counts of
items that the user met already with another, out of a few of each those that rank the window best.

Legend: E events, G labels, K places of a list, W parts (the model, then the sources), F facts.
"""

import copy
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.batches import in_order
from trainer.blend import calibrated
from trainer.dataset import Int64s, LabelGroups
from trainer.evaluate import TOP_K
from trainer.models.sources import UNTUNED_WEIGHTS, SourceGate
from trainer.served import Served, Told

# Labels asked about at a time.
BATCH_LABELS = 64
# Made-up events that say the weights of a gate that was never tuned.
NUM_MADE_UP = 20
# Events that some part named; with fewer the weights stay constant: a linear map of seven facts
# for three parts has 24 numbers.
MIN_EVENTS = 300
# The same for the two factors, which are two numbers.
MIN_FACTOR_EVENTS = 100
# Strength of the pull of the linear map to 0, in events; constant weights are not pulled.
PULL = 3.0
NUM_ITERATIONS = 100
# What the sources' odds against the model are tried to be multiplied with. Never 0: an item that
# the model does not know has to be named by somebody.
ODDS = (1.0, 3.0, 10.0, 0.3, 0.1, 0.03)
# The least and the most that the model weighs at the mean of all facts, however many trainings
# multiply the odds one after another: the next one can still turn it round.
MODEL_WEIGHTS = (0.001, 0.999)
# What the counts of an item that the user met are tried to be multiplied with. Never 0: where
# nothing else is left, it is better than nothing.
MET_FACTORS = (1.0, 0.3, 0.1, 0.01)


def calibrate(served: Served, groups: LabelGroups, *, by_facts: bool = True) -> SourceGate:
    """A gate for a model, fitted to the events of some labels; the same for the same input.

    Args:
        served: The model and its sources.
        groups: Labels the model was not fitted on; there may be none.
        by_facts: False leaves the weights constant.
    """
    if len(groups) == 0:
        return SourceGate.untuned()
    told, group_E, item_id_E = _asked(served, groups)
    share_EW = told.shares_of(group_E, item_id_E)
    named_E = share_EW.sum(dim=1) > 0
    group = torch.from_numpy(group_E)[named_E]
    gate = fitted_gate(
        told.facts_GF[group], told.speaks_GS[group], share_EW[named_E], by_facts=by_facts
    )
    if len(group) < MIN_FACTOR_EVENTS:
        return gate
    events = torch.from_numpy(group_E), torch.from_numpy(item_id_E)
    return best_factors(gate, told, *events)


def are_enough(groups: LabelGroups) -> bool:
    """Whether labels have events enough to weigh the model anew by them."""
    return int(groups.num_rows_G.sum()) >= MIN_EVENTS


def reweighed(served: Served, groups: LabelGroups, gate: SourceGate) -> SourceGate:
    """The gate with the odds that rank the events of some labels best, otherwise as it is.

    Of a version that goes on from another only one thing is new: how much the model is worth. What
    the sources are worth against one another was learned from more, and at all hours of the day.

    Args:
        served: The model and its sources.
        groups: Labels the model was not fitted on, `are_enough` of them.
        gate: Of the earlier training.
    """
    told, group_E, item_E = _asked(served, groups)
    least, most = MODEL_WEIGHTS
    tried = [
        with_factors(gate, odds, gate.met_factor.item())
        for odds in ODDS
        if odds != 1.0 and least <= _model_weight(gate, odds) <= most
    ]
    events = torch.from_numpy(group_E), torch.from_numpy(item_E)
    # Of equals the first: nothing changes without a reason.
    return max([gate, *tried], key=lambda one: ndcg10(told, one, *events))


def _asked(served: Served, groups: LabelGroups) -> tuple[Told, Int64s, Int64s]:
    """What is said at labels; the label and the item of each of their events [E]."""
    told = Told.joined([served.told(part) for part in in_order(groups, size=BATCH_LABELS)])
    group_E = np.repeat(np.arange(len(groups)), groups.num_rows_G)
    first_E = np.cumsum(groups.num_rows_G) - groups.num_rows_G
    row_E = groups.first_row_G[group_E] + np.arange(len(group_E)) - first_E[group_E]
    return told, group_E, served.source.log.item_id_N[row_E]


def _model_weight(gate: SourceGate, odds: float) -> float:
    """What the model weighs at the mean of all facts, with other odds."""
    weight_W = gate.bias_W.detach().double().exp()
    return float(weight_W[0] / (weight_W[0] + odds * weight_W[1:].sum()))


def best_factors(gate: SourceGate, told: Told, group_E: Tensor, item_E: Tensor) -> SourceGate:
    """The gate with the two factors that rank events best; arguments as `ndcg10`."""
    tried = [with_factors(gate, *both) for both in itertools.product(ODDS, MET_FACTORS)]
    # Of equals the first: the likeliest.
    return max(tried, key=lambda one: ndcg10(told, one, group_E, item_E))


def with_factors(gate: SourceGate, odds: float, met_factor: float) -> SourceGate:
    """The gate with the odds of every source against the model multiplied, and `met_factor` set."""
    changed = copy.deepcopy(gate)
    with torch.no_grad():
        changed.bias_W[1:] += math.log(odds)
        changed.met_factor.fill_(met_factor)
    return changed


def ndcg10(told: Told, gate: SourceGate, group_E: Tensor, item_E: Tensor) -> float:
    """NDCG@10 of the mixture over the events of its labels.

    Args:
        told: What model and sources said at each label.
        gate: Weighs them.
        group_E: The label of each event.
        item_E: What came, as raw ids.
    """
    with torch.inference_mode():
        item_GK = told.mixed_by(gate).item_BK[:, :TOP_K]
    discount_K = (torch.arange(item_GK.shape[1]) + 2.0).log2().reciprocal()
    return float(((item_GK[group_E] == item_E.unsqueeze(1)) * discount_K).sum(dim=1).mean())


def fitted_gate(
    facts_EF: Tensor, speaks_ES: Tensor, share_EW: Tensor, *, by_facts: bool = True
) -> SourceGate:
    """The gate under which events are likeliest.

    Args:
        facts_EF: What was known at each event.
        speaks_ES: Which sources said anything then.
        share_EW: What each part gave to the item that came, not 0 everywhere.
        by_facts: False leaves the weights constant.
    """
    made_up = NUM_MADE_UP * np.array(UNTUNED_WEIGHTS)
    gate = SourceGate.constant(calibrated(share_EW.double().numpy(), made_up_S=made_up).tolist())
    if not by_facts or len(share_EW) < MIN_EVENTS:
        return gate
    gate.centre_F.copy_(facts_EF.mean(dim=0))
    gate.spread_F.copy_(facts_EF.std(dim=0).clamp(min=1e-3))
    learned = gate.double()
    facts_EF, share_EW = facts_EF.double(), share_EW.double()
    optimiser = torch.optim.LBFGS(
        learned.parameters(), max_iter=NUM_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        weight_EW = learned(facts_EF, speaks_ES)
        likelihood = (weight_EW * share_EW).sum(dim=1).clamp(min=1e-300).log().mean()
        total: Tensor = PULL / len(share_EW) * learned.weight_WF.square().sum() - likelihood
        torch.autograd.backward(total)
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return learned.float().requires_grad_(requires_grad=False)


def described(gate: SourceGate, names: Sequence[str]) -> dict[str, object]:
    """The gate as a manifest tells it, readable by people: the weights at the window's mean."""
    weights = [round(one, 4) for one in gate.bias_W.detach().softmax(dim=0).tolist()]
    return {
        "weights_at_mean": dict(zip(names, weights, strict=True)),
        "met_factor": round(gate.met_factor.item(), 4),
        "bias": gate.bias_W.tolist(),
        "weight": gate.weight_WF.tolist(),
        "centre": gate.centre_F.tolist(),
        "spread": gate.spread_F.tolist(),
    }
