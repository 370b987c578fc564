"""Items that came after the training get a place in the model, without training it again.

Until a model was extended, a new item comes into answers through what is trending alone.

Legend: V items of the vocabulary, N new items, E width of an item vector.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.batches import BatchSource
from trainer.dataset import EventLog, Int64s, label_groups
from trainer.errors import ExportError
from trainer.export import COMPRESSOR_FILE, ITEM_IDS_FILE, MODEL_FILE, verify
from trainer.item_vectors import with_domains
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.indexer import IndexerConfig
from trainer.models.lifelong import Compressor
from trainer.models.trie import SMOOTHING
from trainer.semantic_ids import SemanticIds, extend_semantic_ids
from trainer.train import Trained
from trainer.vocabulary import Vocabulary, item_counts, item_users

# Readers of a new item that its vector is made from, the first ones: the id of an item must not
# wait for many, and what the hundredth adds is small.
MAX_FIRST_READERS = 100
# Fewer say more about themselves than about the item: its domain's mean vector is used then.
MIN_FIRST_READERS = 3
# Events of a reader before the item, the newest ones: about one visit.
MAX_TOUCHED_BEFORE = 20


def extended(trained: Trained, log: EventLog, *, until_ms: int) -> Trained:
    """A model that also knows the items of the log up to a time; no old item has a new id.

    Every weight stays, the compressor's with its tables too, so that memories stay valid. New
    items get their vector from their first readers or their domain, their id from that vector, and
    their prior from the events they have.
    """
    new_ids = np.setdiff1d(log.item_id_N[log.event_time_ms_N <= until_ms], _ids(trained))
    if len(new_ids) == 0:
        return trained
    old, model = trained.vocabulary, trained.model
    vocabulary = Vocabulary(np.union1d(old.item_ids_V, new_ids), old.domain_ids)
    vectors_VE = model.item.weight.detach()[1:]
    new_vectors_NE = new_item_vectors(log, old, vectors_VE, new_ids, until_ms=until_ms)
    placed = extend_semantic_ids(
        SemanticIds(model.trie.codes_I3[1:], model.trie.sizes),
        with_domains(vectors_VE, trained.source.log, old),
        with_domains(new_vectors_NE, log, Vocabulary(new_ids, old.domain_ids)),
    )
    order = torch.from_numpy(np.argsort(np.concatenate((old.item_ids_V, new_ids)), kind="stable"))
    counts_V = torch.from_numpy(item_counts(log, vocabulary, until_ms=until_ms))
    larger = Gems(
        model.config,
        SemanticIds(placed.codes_V3[order], placed.sizes),
        num_domains=len(old.domain_ids),
        item_vectors_VE=torch.cat((vectors_VE, new_vectors_NE))[order],
        item_counts_V=counts_V,
        item_users_V=torch.from_numpy(item_users(log, vocabulary, until_ms=until_ms)),
        compressor=model.compressor,
    )
    _take_weights(larger, model)
    _set_priors(larger, order >= len(vectors_VE), counts_V)
    source = BatchSource.of(
        log,
        vocabulary,
        num_recent=model.config.num_recent,
        num_mid=model.config.num_mid,
        num_older=model.config.num_older_read,
    )
    return replace(
        trained,
        model=larger.eval(),
        vocabulary=vocabulary,
        source=source,
        groups=label_groups(log),
    )


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
    by_time = by_time[seen_N[by_time] & (item_N[by_time] == 0)]
    by_item = by_time[np.argsort(log.item_id_N[by_time], kind="stable")]
    begins = np.searchsorted(log.item_id_N[by_item], new_ids_N)
    ends = np.searchsorted(log.item_id_N[by_item], new_ids_N, side="right")
    vectors = np.zeros((len(new_ids_N), table_IE.shape[1]), np.float32)
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        rows = by_item[begin:end]
        readers, first = np.unique(log.user_N[rows], return_index=True)
        first_rows = rows[np.sort(first)][:MAX_FIRST_READERS]
        touched = item_N[_rows_before(log, first_rows)]
        if len(readers) < MIN_FIRST_READERS or not touched.any():
            touched = item_N[(log.domain_N == log.domain_N[rows[-1]]) & seen_N]
        touched = touched if touched.any() else np.arange(1, len(table_IE))
        vectors[number] = table_IE[touched[touched > 0]].mean(axis=0)
    return functional.normalize(torch.from_numpy(vectors), dim=1)


def _rows_before(log: EventLog, rows: Int64s) -> Int64s:
    """Rows of the same users right before the given ones."""
    before = rows[:, None] - np.arange(MAX_TOUCHED_BEFORE, 0, -1)[None, :]
    return before[before >= log.offsets[log.user_N[rows]][:, None]]


def _ids(trained: Trained) -> Int64s:
    return trained.vocabulary.item_ids_V


def _take_weights(larger: Gems, model: Gems) -> None:
    """Copy every weight that does not belong to one item or to the tree."""
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not _is_of_items(name)
    }
    missing, unexpected = larger.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(_is_of_items(name) for name in missing), missing


def _is_of_items(name: str) -> bool:
    return name in {"item.weight", "copy.facts_IF"} or name.startswith("trie.")


def _set_priors(model: Gems, is_new_V: Tensor, counts_V: Tensor) -> None:
    """Start the leaves of new items at the log of their events, as old ones once were."""
    if model.config.prior == "off":
        return
    first, second, third = model.trie.codes_I3[1:][is_new_V].unbind(dim=1)
    prior = (counts_V[is_new_V].float() + SMOOTHING).log()
    with torch.no_grad():
        model.biases[2][first * model.trie.sizes[1] + second, third] = prior


@dataclass(frozen=True, slots=True)
class Restored:
    """The weights of a package as a model that can be trained on, extended or exported."""

    model: Gems
    vocabulary_item_ids_V: Int64s
    manifest: dict[str, Any]


def restored(directory: Path) -> Restored:
    """Read the model and the compressor back out of a package.

    Raises:
        ExportError: A file is missing, differs from its hash, or is of a model without compressor.
    """
    manifest = verify(directory)
    if manifest["memory_version"] is None:
        msg = f"{directory} has no {COMPRESSOR_FILE}: its model reads no lifelong stream"
        raise ExportError(msg)
    state = torch.export.load(directory / MODEL_FILE).state_dict
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in state.items()
        if name.startswith("model.")
    }
    settings = manifest["config"]["model"]
    config = GemsConfig(
        **{
            **settings,
            "streams": tuple(settings["streams"]),
            "indexer": IndexerConfig(**settings["indexer"]),
        }
    )
    sizes = tuple(manifest["config"]["code_sizes"])
    vectors = weights["item.weight"][1:]
    folds = torch.export.load(directory / COMPRESSOR_FILE).state_dict
    model = Gems(
        config,
        SemanticIds(weights["trie.codes_I3"][1:], sizes),
        num_domains=manifest["num_domains"],
        item_vectors_VE=vectors,
        item_counts_V=torch.zeros(len(vectors)),
        item_users_V=torch.zeros(len(vectors)),
        compressor=Compressor.restored(folds).requires_grad_(requires_grad=False),
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith(("compressor.", "reconstruction.")) for name in missing), missing
    ids = np.fromfile(directory / ITEM_IDS_FILE, "<i8")
    return Restored(model.eval(), ids, manifest)
