"""Item vectors read off the log, before any model is trained.

Legend: V items, D dimensions.
"""

import numpy as np
import torch
from torch import Tensor

from trainer.dataset import EventLog, Int64s
from trainer.vocabulary import Vocabulary

# Directions kept of the co-occurrence spectrum.
NUM_DIMENSIONS = 64
# Power iterations of the randomised decomposition: the spectrum of such data decays slowly.
NUM_ITERATIONS = 4
# Extra random directions that the decomposition throws away again.
OVERSAMPLING = 8
# Weight of the domain beside the co-occurrence part (which has unit length) in `with_domains`.
DOMAIN_WEIGHT = 0.7


def co_occurrence_vectors(
    log: EventLog,
    vocabulary: Vocabulary,
    *,
    split_ms: int,
    seed: int,
    num_dimensions: int = NUM_DIMENSIONS,
) -> Tensor:
    """Unit vectors [V, D], close for items that share baskets or buyers; 0 for items unseen.

    Rows of the decomposed matrix are baskets (all events of a user at one time) and users; entries
    are counts over the root of both totals, the symmetric form whose inner products follow the
    pointwise mutual information of two items. Only events up to the split count.
    """
    seen = log.event_time_ms_N <= split_ms
    item = vocabulary.index_items(log.item_id_N[seen]) - 1
    assert (item >= 0).all(), "the vocabulary covers every event up to the split"
    user = log.user_N[seen]
    new_row = (np.diff(user, prepend=-1) != 0) | (
        np.diff(log.event_time_ms_N[seen], prepend=-1) != 0
    )
    basket = np.cumsum(new_row) - 1
    row = np.concatenate((basket, basket[-1] + 1 + user))
    incidence = _normalised_incidence(row, np.concatenate((item, item)), vocabulary.num_items)
    rank = min(num_dimensions + OVERSAMPLING, *incidence.shape)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    _, strength, directions_VD = torch.svd_lowrank(incidence, q=rank, niter=NUM_ITERATIONS)
    torch.set_rng_state(generator_state)
    scaled = _sign_fixed(directions_VD * strength.sqrt())
    # The first direction is the popularity of an item and nothing else.
    scaled = scaled[:, 1 : num_dimensions + 1]
    scaled = torch.nn.functional.pad(scaled, (0, num_dimensions - scaled.shape[1]))
    return torch.nn.functional.normalize(scaled, dim=1)


def _normalised_incidence(
    row: np.ndarray[tuple[int], np.dtype[np.int64]],
    item: np.ndarray[tuple[int], np.dtype[np.int64]],
    num_items: int,
) -> Tensor:
    num_rows = int(row.max()) + 1
    cell, count = np.unique(row * num_items + item, return_counts=True)
    cell_row, cell_item = np.divmod(cell, num_items)
    weight = np.sqrt(count)
    row_total = np.bincount(cell_row, weight, minlength=num_rows)
    item_total = np.bincount(cell_item, weight, minlength=num_items)
    value = weight / np.sqrt(row_total[cell_row] * item_total[cell_item])
    return torch.sparse_coo_tensor(
        torch.from_numpy(np.stack((cell_row, cell_item))),
        torch.from_numpy(value.astype(np.float32)),
        (num_rows, num_items),
        is_coalesced=True,
        check_invariants=True,
    )


def _sign_fixed(vectors_VD: Tensor) -> Tensor:
    """A decomposition leaves signs open: the largest entry of each column is made positive."""
    largest = vectors_VD.abs().argmax(dim=0, keepdim=True)
    return vectors_VD * vectors_VD.gather(0, largest).sign()


def domains_of(log: EventLog, vocabulary: Vocabulary, *, until_ms: int | None = None) -> Int64s:
    """Dense domain [V] of the last row of each item, UNKNOWN for items without one.

    Only events up to `until_ms` are looked at, all if it is left out.
    """
    seen = slice(None) if until_ms is None else log.event_time_ms_N <= until_ms
    item = vocabulary.index_items(log.item_id_N[seen])
    domain_I = np.zeros(vocabulary.num_items + 1, np.int64)
    domain_I[item] = vocabulary.index_domains(log.domain_N[seen])
    return domain_I[1:]


def with_domains(vectors_VD: Tensor, log: EventLog, vocabulary: Vocabulary) -> Tensor:
    """Append a one-hot of an item's domain, so that codes respect it."""
    domain_V = domains_of(log, vocabulary)
    return beside_domains(vectors_VD, domain_V, num_domains=len(vocabulary.domain_ids))


def beside_domains(vectors_VD: Tensor, domain_V: Int64s, *, num_domains: int) -> Tensor:
    """The same from dense domains."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(domain_V), num_domains + 1)
    return torch.cat((vectors_VD, DOMAIN_WEIGHT * one_hot.float()), dim=1)
