"""A blend weighs its sources as the tuning window says, and adds up what they say."""

import numpy as np
import pytest

from trainer.baselines import Scored, ScoredRanker
from trainer.blend import blended, calibrated, target_shares
from trainer.dataset import EventLog, LabelGroups, label_groups
from trainer.streaming_evaluation import LIST_LENGTH


def constant(items: list[int], shares: list[float]) -> ScoredRanker:
    row = np.array(items + [0] * (LIST_LENGTH - len(items)))
    share = np.array(shares + [0.0] * (LIST_LENGTH - len(items)))

    def rank(groups: LabelGroups) -> Scored:
        return np.tile(row, (len(groups), 1)), np.tile(share, (len(groups), 1))

    return rank


def test_shares_add_up_and_order_the_list(log: EventLog) -> None:
    sources = [constant([3, 5], [0.6, 0.4]), constant([5, 7], [0.9, 0.1])]
    items, shares = blended(sources, np.array([0.5, 0.5]))(label_groups(log).select(slice(2)))
    assert items.shape == (2, LIST_LENGTH)
    assert items[1, :4].tolist() == [5, 3, 7, 0]
    assert shares[1, :4].tolist() == pytest.approx([0.65, 0.3, 0.05, 0.0])


def test_the_weights_are_the_likeliest() -> None:
    """Events of a known mixture of two sources give its weights back."""
    rng = np.random.default_rng(3)
    one, two = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(20))
    true = np.array([0.3, 0.7])
    item = rng.choice(20, 20_000, p=true @ np.stack((one, two)))
    assert calibrated(np.stack((one[item], two[item]), axis=1)) == pytest.approx(true, abs=0.04)


def test_a_source_that_names_nothing_gets_no_weight() -> None:
    weight = calibrated(np.array([[0.0, 0.2], [0.0, 0.1], [0.0, 0.0]]))
    assert weight == pytest.approx([0.0, 1.0])
    assert calibrated(np.zeros((2, 2))) == pytest.approx([0.5, 0.5]), "nothing was told"


def test_the_share_of_what_came_is_found(log: EventLog) -> None:
    scored = constant([3, 5], [0.6, 0.4])(label_groups(log).select(slice(2)))
    group, item = np.array([0, 1, 1]), np.array([5, 3, 9])
    assert target_shares(scored, group, item).tolist() == [0.4, 0.6, 0.0]
