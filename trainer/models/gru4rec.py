"""GRU4Rec: a gated recurrent unit over the items of one stream.

Source: GRU4Rec, arXiv 1511.06939. Its ranking losses and session-parallel batches are replaced by
the loss and the batches that all rivals share (sequence.py).

Legend: B users, N events, D width.
"""

from torch import Tensor, nn

from trainer.batches import Stream
from trainer.models.sequence import SequenceConfig, SequenceModel


class Gru4Rec(SequenceModel):
    """One recurrent layer; padding stands in front and leaves the first state as it was."""

    def __init__(
        self, config: SequenceConfig, *, item_vectors_VE: Tensor, item_counts_V: Tensor
    ) -> None:
        super().__init__(config, item_vectors_VE=item_vectors_VE, item_counts_V=item_counts_V)
        self.gru = nn.GRU(config.width, config.width, batch_first=True)
        self.out = nn.Linear(config.width, config.width)

    def states(self, stream: Stream) -> Tensor:
        """Hidden state after each event [B, N, D].

        Padding is read as zero vectors, so a short history starts from the state that so many
        zeros leave; it is learned like any other start.
        """
        x_BND = self.dropout(self.items.vector(stream.item)) * stream.mask.unsqueeze(2)
        hidden_BND, _ = self.gru(x_BND)
        changed: Tensor = self.out(self.dropout(hidden_BND))
        return changed
