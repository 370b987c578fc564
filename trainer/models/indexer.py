"""The indexer: a small scorer that learns which mid-term events full attention would look at.

Source: GEMs, arXiv 2602.13631, section on the lightweight indexer (two heads, one learned weight a
head, distilled from the summed attention logits, detached, top-K at inference) and its three
training stages. Inferred: queries and weights come from the decoder's state and keys from the
mid-term stream, as the paper's figure has it; the default direction of the divergence is
KL(teacher || student), which covers all that the teacher looks at.

Legend: B batch, Q queries, N keys, D width, H heads of the attention, G heads of the indexer,
E width of an attention head, K keys kept.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.models.layers import Attention, Branch, Memory, StreamTokens

# 1: full attention. 2: full attention, and the indexer learns from it. 3: as served, top-K on.
Stage = Literal[1, 2, 3]
FULL: Final = 1
DISTIL: Final = 2
TOP_K: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """Sizes and switches of the indexer; stored with every export.

    Attributes:
        top_k: Keys that attention sees. The paper does not give it; a seventh of the small
            mid-term stream, so that the saving can be seen at all.
        relu: Cut negative similarities of a head to 0, as DeepSeek's ancestor of it does.
        direction: "teacher" is KL(teacher || student), "student" the other way round.
    """

    num_heads: int = 2
    key_width: int = 16
    top_k: int = 64
    relu: bool = False
    direction: Literal["teacher", "student"] = "teacher"


class Indexer(nn.Module):
    """Scores every key for every query. Nothing it learns reaches what it reads."""

    def __init__(self, width: int, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, config.num_heads * config.key_width, bias=False)
        self.key = nn.Linear(width, config.num_heads * config.key_width, bias=False)
        self.weight = nn.Linear(width, config.num_heads)

    def remember(self, source_BND: Tensor) -> Tensor:
        """Keys [B, N, G * key width], computed once and asked many times."""
        keys: Tensor = self.key(source_BND.detach())
        return keys

    def forward(self, query_BQD: Tensor, key_BNX: Tensor) -> Tensor:
        """Scores [B, Q, N]; those of padding mean nothing."""
        query_BQD = query_BQD.detach()
        heads = (self.config.num_heads, self.config.key_width)
        query_BQGE = self.query(query_BQD).view(*query_BQD.shape[:2], *heads)
        score_BQN: Tensor
        weight_BQG1 = self.weight(query_BQD).unsqueeze(3) / math.sqrt(self.config.key_width)
        if not self.config.relu:
            # A weighted sum of dot products is one dot product with a weighted query.
            score_BQN = (query_BQGE * weight_BQG1).flatten(2) @ key_BNX.transpose(1, 2)
            return score_BQN
        key_BGEN = key_BNX.view(*key_BNX.shape[:2], *heads).permute(0, 2, 3, 1)
        score_BGQN = (query_BQGE.transpose(1, 2) @ key_BGEN).relu()
        score_BQN = (score_BGQN * weight_BQG1.transpose(1, 2)).sum(dim=1)
        return score_BQN


class IndexedBranch(Branch):
    """Cross-attention to one stream that may look at the K keys of the highest score only."""

    def __init__(self, width: int, num_heads: int, config: IndexerConfig) -> None:
        super().__init__(width, num_heads)
        self.indexer = Indexer(width, config)
        self.stage: Stage = 1

    def remember(self, stream: StreamTokens) -> Memory:
        """Keys and values of the stream, and the indexer's keys."""
        source = self.norm_memory(stream.tokens_BND)
        memory = self.attention.remember(source, stream.mask_BN.unsqueeze(1))
        return memory._replace(index_key_BNX=self.indexer.remember(source))

    def read(self, query_BQD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The answer [B, Q, D], and the divergence from the teacher while that is learned."""
        none = query_BQD.new_zeros(())
        if self.stage == FULL:
            return self.attention(query_BQD, memory), none
        assert memory.index_key_BNX is not None, "the memory was made by this branch"
        score_BQN = self.indexer(query_BQD, memory.index_key_BNX)
        loss = self._divergence(query_BQD, memory, score_BQN) if self.training else none
        if self.stage == DISTIL:
            return self.attention(query_BQD, memory), loss
        return top_k_attention(
            self.attention, query_BQD, memory, score_BQN, top_k=self.indexer.config.top_k
        ), loss

    def _divergence(self, query_BQD: Tensor, memory: Memory, score_BQN: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_BQN = summed_logits(self.attention, query_BQD, memory)
        mask_B1N = memory.mask_B1QN[:, 0]
        return divergence(score_BQN, teacher_BQN, mask_B1N, direction=self.indexer.config.direction)


def summed_logits(attention: Attention, query_BQD: Tensor, memory: Memory) -> Tensor:
    """What full attention's heads say together, before any softmax [B, Q, N]."""
    query_BHQE = attention.split(attention.query(query_BQD))
    logits_BHQN = query_BHQE @ memory.key_BHNE.transpose(2, 3)
    return logits_BHQN.sum(dim=1) / math.sqrt(query_BHQE.shape[3])


def divergence(
    student_BQN: Tensor,
    teacher_BQN: Tensor,
    mask_B1N: Tensor,
    *,
    direction: Literal["teacher", "student"],
) -> Tensor:
    """Mean Kullback-Leibler divergence over the queries that have any key; 0 without one."""
    lowest = torch.finfo(student_BQN.dtype).min
    log_student = student_BQN.masked_fill(~mask_B1N, lowest).log_softmax(dim=2)
    log_teacher = teacher_BQN.masked_fill(~mask_B1N, lowest).log_softmax(dim=2)
    first, second = (
        (log_teacher, log_student) if direction == "teacher" else (log_student, log_teacher)
    )
    term_BQN = (first.exp() * (first - second)).masked_fill(~mask_B1N, 0.0)
    has_key_B1 = mask_B1N.any(dim=2)
    num_queries = has_key_B1.sum() * student_BQN.shape[1]
    return (term_BQN.sum(dim=2) * has_key_B1).sum() / num_queries.clamp(min=1)


def top_k_attention(
    attention: Attention, query_BQD: Tensor, memory: Memory, score_BQN: Tensor, *, top_k: int
) -> Tensor:
    """Attention [B, Q, D] over each query's K best keys; with K >= N it is full attention."""
    mask_B1N = memory.mask_B1QN[:, 0]
    size = min(top_k, score_BQN.shape[2])
    lowest = torch.finfo(score_BQN.dtype).min
    top_BQK = score_BQN.masked_fill(~mask_B1N, lowest).topk(size, dim=2, sorted=False)[1]
    key_BQHKE, value_BQHKE = (
        _gather(table, top_BQK) for table in (memory.key_BHNE, memory.value_BHNE)
    )
    seen_BQK = mask_B1N.expand(-1, top_BQK.shape[1], -1).gather(2, top_BQK)
    some_BQ1 = seen_BQK.any(dim=2, keepdim=True)
    query_BQH1E = attention.split(attention.query(query_BQD)).transpose(1, 2).unsqueeze(3)
    logits = (query_BQH1E @ key_BQHKE.transpose(3, 4)) / math.sqrt(query_BQH1E.shape[4])
    # A query without any key looks everywhere to stay finite, and is zeroed below.
    looks_BQ11K = (seen_BQK | ~some_BQ1)[:, :, None, None, :]
    share = logits.masked_fill(~looks_BQ11K, lowest).softmax(dim=4)
    answer_BQD = (share @ value_BQHKE).squeeze(3).flatten(2) * some_BQ1
    merged: Tensor = attention.out(answer_BQD)
    return merged


def _gather(table_BHNE: Tensor, top_BQK: Tensor) -> Tensor:
    """Rows of each query's own keys [B, Q, H, K, E]."""
    batch, num_heads, num_keys, width = table_BHNE.shape
    # Whole rows are copied at once; an index per element would cost ten times as much.
    rows = table_BHNE.transpose(1, 2).reshape(batch * num_keys, num_heads * width)
    begin_B11 = torch.arange(batch, device=top_BQK.device)[:, None, None] * num_keys
    taken = rows.index_select(0, (top_BQK + begin_B11).flatten())
    return taken.view(*top_BQK.shape, num_heads, width).transpose(2, 3)


def recall_of_mass(student_BQN: Tensor, teacher_BQN: Tensor, mask_B1N: Tensor, *, k: int) -> Tensor:
    """Share of the teacher's attention that stands on the student's K best keys [B, Q]."""
    lowest = torch.finfo(student_BQN.dtype).min
    top = student_BQN.masked_fill(~mask_B1N, lowest).topk(min(k, student_BQN.shape[2]), dim=2)[1]
    mass = functional.softmax(teacher_BQN.masked_fill(~mask_B1N, lowest), dim=2)
    return mass.gather(2, top).sum(dim=2)
