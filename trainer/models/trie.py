"""The tree of semantic ids that exist.

Legend: I = V + 1 dense items (0 unknown), V items, K1, K2, K3 codes of the levels, P = K1 * K2
prefixes of two codes. A prefix s1, s2 is numbered s1 * K2 + s2.
"""

import torch
from torch import Tensor, nn

from trainer.semantic_ids import SemanticIds

# Added to a count before its logarithm: an empty prefix keeps a finite, small prior.
SMOOTHING = 0.5


class ItemTrie(nn.Module):
    """Which item stands at which code triple, as dense tensors.

    Attributes:
        codes_I3: Codes of each dense item; those of item 0 mean nothing.
        item_PK: Dense item at each leaf, 0 where there is none.
        valid_K, valid_KK: Codes, and pairs of codes, below which an item exists.
    """

    codes_I3: Tensor
    item_PK: Tensor
    valid_K: Tensor
    valid_KK: Tensor

    def __init__(self, semantic_ids: SemanticIds) -> None:
        super().__init__()
        codes = semantic_ids.codes_V3
        self.sizes = semantic_ids.sizes
        size1, size2, size3 = self.sizes
        item_PK = torch.zeros(size1 * size2, size3, dtype=torch.int64)
        prefix = codes[:, 0] * size2 + codes[:, 1]
        item_PK[prefix, codes[:, 2]] = torch.arange(1, len(codes) + 1)
        valid_KK = (item_PK > 0).any(dim=1).view(size1, size2)
        self.register_buffer("codes_I3", torch.cat((torch.zeros_like(codes[:1]), codes)))
        self.register_buffer("item_PK", item_PK)
        self.register_buffer("valid_KK", valid_KK)
        self.register_buffer("valid_K", valid_KK.any(dim=1))

    def log_counts(self, item_counts_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the events below each node: [K1], [K1, K2] and [P, K3]."""
        size1, size2, _ = self.sizes
        counts = torch.cat((torch.zeros(1), item_counts_V.float()))
        leaf_PK = counts[self.item_PK]
        pair_KK = leaf_PK.sum(dim=1).view(size1, size2)
        return _smooth_log(pair_KK.sum(dim=1)), _smooth_log(pair_KK), _smooth_log(leaf_PK)

    def allowed_nodes(self, allowed_BI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes with an allowed item below them: [B, K1], [B, K1, K2], [B, P, K3]."""
        size1, size2, _ = self.sizes
        leaf_BPK = allowed_BI[:, self.item_PK.flatten()].view(-1, *self.item_PK.shape)
        pair_BKK = leaf_BPK.any(dim=2).view(-1, size1, size2)
        return pair_BKK.any(dim=2), pair_BKK, leaf_BPK


def _smooth_log(count: Tensor) -> Tensor:
    return (count + SMOOTHING).log()
