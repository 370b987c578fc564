"""What a later training goes on from: a model as it was trained, in one safetensors file.

The exported graphs are no place for it: they lack what only training needs, and torch may write
them differently one day. The optimiser is not kept: its means are of the data of then.

Legend: V items.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.dataset import Int64s
from trainer.errors import ExportError
from trainer.loop import LoopConfig
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.indexer import IndexerConfig
from trainer.models.lifelong import Compressor
from trainer.models.sources import SourceGate
from trainer.semantic_ids import SemanticIds
from trainer.train import TrainConfig, Trained
from trainer.vocabulary import Vocabulary

Float64s = NDArray[np.float64]

STATE_FILE: Final = "training.safetensors"
# Raised when an older file can no longer be gone on from.
STATE_VERSION: Final = 2
# Tables beside the weights: one row an item, or a domain.
_TABLES: Final = ("item_ids", "domain_ids", "counts", "domains")


@dataclass(frozen=True, slots=True)
class WarmState:
    """A trained model and what its items are known by.

    Attributes:
        count_V: Events of each item that the priors stand on.
        domain_V: Dense domain of each item that its semantic id was made with.
        split_ms: The newest time that was learned from.
        gate: How the model is weighed against the live sources.
    """

    model: Gems
    vocabulary: Vocabulary
    count_V: Float64s
    domain_V: Int64s
    config: TrainConfig
    split_ms: int
    gate: SourceGate

    @classmethod
    def of(cls, trained: Trained) -> Self:
        """What a training left; the model is shared, not copied."""
        return cls(
            model=trained.model,
            vocabulary=trained.vocabulary,
            count_V=trained.count_V,
            domain_V=trained.domain_V,
            config=trained.config,
            split_ms=trained.split_ms,
            gate=trained.gate,
        )


def save_state(trained: Trained, folder: Path) -> Path:
    """Write the state of a training beside its package; returns the file."""
    state = WarmState.of(trained)
    tables = (
        state.vocabulary.item_ids_V,
        state.vocabulary.domain_ids,
        state.count_V,
        state.domain_V,
    )
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"gate.{name}": value for name, value in state.gate.state_dict().items()}
    tensors |= {name: torch.from_numpy(table) for name, table in zip(_TABLES, tables, strict=True)}
    facts = {
        "version": STATE_VERSION,
        "config": asdict(state.config),
        "split_ms": state.split_ms,
    }
    path = folder / STATE_FILE
    # safetensors wants every tensor to own its memory.
    owned = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(owned, path, metadata={"facts": json.dumps(facts)})
    return path


def read_state(path: Path) -> WarmState:
    """The state in a file.

    Raises:
        ExportError: It cannot be read, or is of another Moveline.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["version"] != STATE_VERSION:
            raise ExportError(
                f"{path} has version {facts['version']}, this Moveline reads {STATE_VERSION}; "
                "train anew: moveline train"
            )
        config = _config(facts["config"])
        item_ids, domain_ids, counts, domains = (tensors.pop(name).numpy() for name in _TABLES)
        weights, gate = (_named(tensors, part) for part in ("model.", "gate."))
        return WarmState(
            model=_model(config, weights, counts, num_domains=len(domain_ids)),
            vocabulary=Vocabulary(item_ids, domain_ids),
            count_V=counts,
            domain_V=domains,
            config=config,
            split_ms=facts["split_ms"],
            gate=_gate(gate),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        # What torch says of weights that do not fit is a RuntimeError.
        msg = f"{path} cannot be gone on from ({error}); train anew: moveline train"
        raise ExportError(msg) from error


def _named(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)
    }


def _gate(weights: dict[str, torch.Tensor]) -> SourceGate:
    gate = SourceGate()
    gate.load_state_dict(weights)
    return gate


def _config(facts: dict[str, Any]) -> TrainConfig:
    model = facts["model"]
    gems = GemsConfig(
        **{
            # States of before that extension have no head.
            "dense": "off",
            **model,
            "streams": tuple(model["streams"]),
            "indexer": IndexerConfig(**model["indexer"]),
        }
    )
    return TrainConfig(
        **{
            **facts,
            "code_sizes": tuple(facts["code_sizes"]),
            "model": gems,
            "loop": LoopConfig(**facts["loop"]),
        }
    )


def _model(
    config: TrainConfig,
    weights: dict[str, torch.Tensor],
    count_V: Float64s,
    *,
    num_domains: int,
) -> Gems:
    folds = _named(weights, "compressor.")
    model = Gems(
        config.model,
        SemanticIds(weights["trie.codes_I3"][1:], config.code_sizes),
        num_domains=num_domains,
        item_vectors_VE=weights["item.weight"][1:],
        item_counts_V=torch.from_numpy(np.array(count_V)),
        # What stands on these comes with the weights.
        item_users_V=torch.from_numpy(np.array(count_V)),
        compressor=Compressor.restored(folds) if folds else None,
    )
    model.load_state_dict(weights)
    return model.eval()
