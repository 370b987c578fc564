"""Items that came after a training get a place in the model, without training it from the start.

Until a model was extended, a new item comes into answers through what is trending alone.

Legend: V items of the vocabulary, N new items, E width of an item vector.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainer.dataset import EventLog, Int64s
from trainer.item_vectors import beside_domains, domains_of
from trainer.models.gems import Gems
from trainer.models.lifelong import Compressor
from trainer.models.next_items import SMOOTHING, ItemTable
from trainer.models.trie import ItemTrie
from trainer.semantic_ids import SemanticIds, extend_semantic_ids
from trainer.training_state import WarmState
from trainer.vocabulary import UNKNOWN, Vocabulary, item_users

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]

# Readers of a new item that its vector is made from, the first ones: the id of an item must not
# wait for many, and what the hundredth adds is small.
MAX_FIRST_READERS = 100
# Fewer say more about themselves than about the item: its domain's mean vector is used then.
MIN_FIRST_READERS = 3
# Events of a reader before the item, the newest ones: about one visit.
MAX_TOUCHED_BEFORE = 20


def extended(
    state: WarmState, log: EventLog, *, until_ms: int, from_ms: int | None = None
) -> WarmState:
    """A copy of the model that also knows the items of the log up to a time.

    No old item gets a new id, and every weight stays, the compressor's with its tables too, so that
    memories stay valid; it is frozen. New items get their vector from their first readers or their
    domain, and their id from that vector. The priors of all items start again from the events
    between `from_ms` and `until_ms`: what training added to the old ones is kept.

    Raises:
        VocabularyError: There are more items than semantic ids.
    """
    old, model = state.vocabulary, state.model
    seen_N = log.event_time_ms_N <= until_ms
    new_ids = np.setdiff1d(log.item_id_N[seen_N], old.item_ids_V)
    vocabulary = Vocabulary(np.union1d(old.item_ids_V, new_ids), old.domain_ids)
    order = np.argsort(np.concatenate((old.item_ids_V, new_ids)), kind="stable")
    vectors_VE = model.item.weight.detach()[1:]
    new_vectors_NE = new_item_vectors(log, old, vectors_VE, new_ids, until_ms=until_ms)
    new_place = vocabulary.index_items(new_ids) - 1
    domain_V = np.concatenate(
        (state.domain_V, domains_of(log, vocabulary, until_ms=until_ms)[new_place])
    )
    semantic_ids = _placed(model.trie, vectors_VE, new_vectors_NE, domain_V, old)
    count_V = window_counts(log, vocabulary, until_ms=until_ms, from_ms=from_ms)
    larger = Gems(
        model.config,
        SemanticIds(semantic_ids.codes_V3[torch.from_numpy(order)], semantic_ids.sizes),
        num_domains=len(old.domain_ids),
        item_vectors_VE=torch.cat((vectors_VE, new_vectors_NE))[torch.from_numpy(order)],
        item_counts_V=torch.from_numpy(count_V),
        item_users_V=torch.from_numpy(
            item_users(log, vocabulary, until_ms=until_ms, from_ms=from_ms)
        ),
        compressor=_frozen(model),
    )
    _take_weights(larger, model)
    if model.config.dense == "on":
        trained_VE = model.dense.items.vector.weight.detach()[1:]
        near_NE = new_item_vectors(log, old, trained_VE, new_ids, until_ms=until_ms)
        near_NE = near_NE * trained_VE.norm(dim=1).mean()
        _take_item_table(larger.dense.items, model.dense.items, near_NE, torch.from_numpy(order))
    old_count_V = np.concatenate((state.count_V, np.zeros(len(new_ids))))[order]
    renew_priors(larger, old_count_V, count_V)
    return replace(
        state,
        model=larger.eval(),
        vocabulary=vocabulary,
        count_V=count_V,
        domain_V=domain_V[order],
        split_ms=until_ms,
    )


def _placed(
    trie: ItemTrie, vectors_VE: Tensor, new_vectors_NE: Tensor, domain_V: Int64s, old: Vocabulary
) -> SemanticIds:
    """The ids of the old items as they were, then those of the new ones."""
    num_old, num_domains = old.num_items, len(old.domain_ids)
    return extend_semantic_ids(
        SemanticIds(trie.codes_I3[1:], trie.sizes),
        beside_domains(vectors_VE, domain_V[:num_old], num_domains=num_domains),
        beside_domains(new_vectors_NE, domain_V[num_old:], num_domains=num_domains),
    )


def window_counts(
    log: EventLog,
    vocabulary: Vocabulary,
    *,
    until_ms: int,
    from_ms: int | None = None,
    half_life_ms: int | None = None,
) -> Float64s:
    """Events of each item between two times [V]; with a half-life, each as old as it is."""
    time_ms_N = log.event_time_ms_N
    counted_N = time_ms_N <= until_ms
    if from_ms is not None:
        counted_N = counted_N & (time_ms_N >= from_ms)
    item = vocabulary.index_items(log.item_id_N[counted_N])
    weight = None
    if half_life_ms is not None:
        weight = 0.5 ** ((until_ms - time_ms_N[counted_N]) / half_life_ms)
    counts = np.bincount(item, weight, minlength=vocabulary.num_items + 1)[1:]
    return counts.astype(np.float64)


def new_item_vectors(
    log: EventLog, vocabulary: Vocabulary, vectors_VE: Tensor, new_ids_N: Int64s, *, until_ms: int
) -> Tensor:
    """Vectors [N, E] among those of the old items, of unit length; 0 if nothing is known.

    An item's vector is the mean of what its first readers touched right before it. With too few of
    them it is the mean of the items of its domain, and with none of these, of all items.
    """
    item_N, seen_N = vocabulary.index_items(log.item_id_N), log.event_time_ms_N <= until_ms
    table_IE = functional.pad(vectors_VE, (0, 0, 1, 0)).numpy()
    by_time = np.argsort(log.event_time_ms_N, kind="stable")
    by_time = by_time[seen_N[by_time] & (item_N[by_time] == UNKNOWN)]
    by_item = by_time[np.argsort(log.item_id_N[by_time], kind="stable")]
    begins = np.searchsorted(log.item_id_N[by_item], new_ids_N)
    ends = np.searchsorted(log.item_id_N[by_item], new_ids_N, side="right")
    of_domain = _domain_means(log.domain_N[seen_N], item_N[seen_N], table_IE)
    of_all_E = table_IE[1:].mean(axis=0)
    vectors = np.zeros((len(new_ids_N), table_IE.shape[1]), np.float32)
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        rows = by_item[begin:end]
        readers, first = np.unique(log.user_N[rows], return_index=True)
        first_rows = rows[np.sort(first)][:MAX_FIRST_READERS]
        touched = item_N[_rows_before(log, first_rows)]
        touched = touched[touched != UNKNOWN]
        if len(readers) < MIN_FIRST_READERS or len(touched) == 0:
            vectors[number] = of_domain.get(int(log.domain_N[rows[-1]]), of_all_E)
        else:
            vectors[number] = table_IE[touched].mean(axis=0)
    return functional.normalize(torch.from_numpy(vectors), dim=1)


def _domain_means(domain_N: Int64s, item_N: Int64s, table_IE: Float32s) -> dict[int, Float32s]:
    """Mean vector of the known items met in each domain, an item as often as it was met."""
    known_N = item_N != UNKNOWN
    return {
        int(domain): table_IE[item_N[known_N & (domain_N == domain)]].mean(axis=0)
        for domain in np.unique(domain_N[known_N])
    }


def _rows_before(log: EventLog, rows: Int64s) -> Int64s:
    """Rows of the same users right before the given ones."""
    before = rows[:, None] - np.arange(MAX_TOUCHED_BEFORE, 0, -1)[None, :]
    return before[before >= log.offsets[log.user_N[rows]][:, None]]


def _frozen(model: Gems) -> Compressor | None:
    """The compressor for good: memories were made with it."""
    if model.compressor is None:
        return None
    return copy.deepcopy(model.compressor).requires_grad_(requires_grad=False)


def _take_weights(larger: Gems, model: Gems) -> None:
    """Copy every weight that does not belong to one item or to the tree."""
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not _is_of_items(name)
    }
    missing, unexpected = larger.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(_is_of_items(name) for name in missing), missing


def _is_of_items(name: str) -> bool:
    return name in {"item.weight", "copy.facts_IF"} or name.startswith(("trie.", "dense.items."))


def _take_item_table(larger: ItemTable, table: ItemTable, near_NE: Tensor, order_V: Tensor) -> None:
    """Rows of the old items as they were trained, then new ones, in the order of the vocabulary."""
    uncounted_N = torch.full((len(near_NE),), math.log(SMOOTHING))
    with torch.no_grad():
        larger.vector.weight[1:] = torch.cat((table.vector.weight[1:], near_NE))[order_V]
        larger.bias_I[1:] = torch.cat((table.bias_I[1:], uncounted_N))[order_V]


def renew_priors(model: Gems, old_count_V: Float64s, count_V: Float64s) -> None:
    """Replace the counts that the priors of every node of the tree stand on, and the dense head's.

    What training added to them stays.
    """
    if model.config.dense == "on":
        before_V, after_V = (torch.from_numpy(one + SMOOTHING) for one in (old_count_V, count_V))
        with torch.no_grad():
            model.dense.items.bias_I[1:] += (after_V / before_V).log().float()
    if model.config.prior == "off":
        return
    befores = model.trie.log_counts(torch.from_numpy(old_count_V))
    afters = model.trie.log_counts(torch.from_numpy(count_V))
    with torch.no_grad():
        for bias, before, after in zip(model.biases, befores, afters, strict=True):
            bias.add_(after - before)
