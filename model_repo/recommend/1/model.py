"""Triton's `recommend`: translates tensors; what it answers is decided in scoring/recommend.py."""

from __future__ import annotations

import gc
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from features.clock import now_ms
from features.redis import connect
from scoring.counts import LOG_DROPPED, LOGGED, METRICS, SHADOW_DROPPED, Counts, Teller
from scoring.feature_log import FeatureLog
from scoring.live import Live
from scoring.recommend import Answered, Ask, RetrievalError, Retrieved, answer, answer_shadow
from scoring.shadow import Shadow
from scoring.signature import (
    CANDIDATES_MAX,
    K_MAX,
    LOGGED_SHARE_DEFAULT,
    NO_ITEM,
    RETRIEVAL_MODEL,
)
from scoring.tensors import retrieval_inputs
from streams.feature_log import FeatureLogProducer
from streams.properties import KafkaConfig
from streams.topics import DEFAULT_PREFIX, Topics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.sources import Counted
    from features.view import StreamBatch
    from scoring.counts import Metric

log = logging.getLogger("moveline.recommend")

# Domain hashes are unsigned; tensors carry their bits as signed numbers.
_HASHES = 2**64
_INPUTS = ("user_id", "k", "min_partition", "min_offset", "wait_ms", "exclude_seen")
# Redis beyond this is "away" for an answer: trending now beats state later.
_REDIS_TIMEOUT_S = 0.25
# A request with less time is answered by itself: a batch has the time of its most hurried ask.
_HURRIED_MS = 300
# Requests of one instance that wait for a position or are hurried at a time; a thread and a Redis
# connection each. One more waits for a thread first, within its deadline.
_WAITING_MAX = 64


def read(request: Any, name: str) -> torch.Tensor:  # noqa: ANN401 - Triton's objects are untyped
    """Return an input tensor without a copy."""
    return from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack())


def output(name: str, tensor: torch.Tensor) -> Any:  # noqa: ANN401 - Triton's objects are untyped
    """Return an output (or nested input) tensor without a copy."""
    return pb_utils.Tensor.from_dlpack(name, tensor.contiguous().__dlpack__())


def retrieve(
    version: int,
    streams: StreamBatch,
    excluded: Sequence[Sequence[int]],
    withdrawn: frozenset[int],
    *,
    counted: Counted,
    candidates: Sequence[Sequence[int]],
    in_domain: Sequence[int],
) -> Retrieved:
    """Ask one pinned version of the retrieval model, inside the same server."""
    inputs = retrieval_inputs(
        streams,
        excluded,
        withdrawn,
        counted=counted,
        candidates=candidates,
        in_domain=in_domain,
    )
    response = pb_utils.InferenceRequest(
        model_name=RETRIEVAL_MODEL,
        model_version=version,
        requested_output_names=["item_id", "score", "contribution"],
        inputs=[output(name, tensor) for name, tensor in inputs.items()],
    ).exec()
    if response.has_error():
        raise RetrievalError(response.error().message())
    outputs = {
        name: from_dlpack(pb_utils.get_output_tensor_by_name(response, name).to_dlpack())
        for name in ("item_id", "score", "contribution")
    }
    return Retrieved(
        outputs["item_id"].tolist(), outputs["score"].tolist(), outputs["contribution"].tolist()
    )


class TritonPythonModel:
    """One instance; Triton runs it in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Connect to Redis, start following the live pointers, open the feature log."""
        torch.set_num_threads(1)
        url = os.environ.get("MOVELINE_REDIS__URL")
        if not url:
            raise pb_utils.TritonModelException(
                "MOVELINE_REDIS__URL is not set in tritonserver's environment: the recommend "
                "model reads every user's state from Redis."
            )
        self.live = Live(connect(url, timeout_s=_REDIS_TIMEOUT_S))
        self.live.start()
        self.counts = Counts()
        self.metrics = TritonMetrics(args["model_instance_name"])
        self.teller = Teller(self.counts, self.metrics.tell)
        self.teller.start()
        self.producer = open_producer(self.counts)
        self.feature_log = (
            FeatureLog(share=logged_share(), send=self.producer.send) if self.producer else None
        )
        self.shadow = Shadow(self._answer_shadow, lambda: self.counts.add(SHADOW_DROPPED))
        self.shadow.start()
        self.waiting = ThreadPoolExecutor(_WAITING_MAX, thread_name_prefix="moveline-wait")

    def execute(self, requests: list[Any]) -> None:
        """Answer every request; those that wait for a position, or hurry, in a thread each.

        They are batched with others and are more than there are instances: waiting in here would
        hold up everybody. Their number is bounded by Triton's queue and the clients' slots.
        """
        quick: list[tuple[Any, list[Ask]]] = []
        for request in requests:
            sender, asks = request.get_response_sender(), read_asks(request)
            wrong = next(filter(None, map(refusal, asks)), None)
            if wrong is not None:
                send(sender, refuse(wrong))
            elif any(ask.min_partition >= 0 or is_hurried(ask) for ask in asks):
                self.waiting.submit(self._answer, [(sender, asks)])
            else:
                quick.append((sender, asks))
        if quick:
            self._answer(quick)

    def _answer(self, group: list[tuple[Any, list[Ask]]]) -> None:
        flat = [ask for _, asks in group for ask in asks]
        answered: list[Answered] = []
        at_ms = now_ms()
        try:
            answered = answer(flat, self.live, retrieve, at_ms)
            answers = iter(answered)
            responses = [respond([next(answers) for _ in asks], asks) for _, asks in group]
        except Exception as error:  # a request without a response would stay in Triton for ever
            log.exception("not answered")
            responses = [fail(f"{type(error).__name__}: {error}") for _ in group]
        for (sender, _), response in zip(group, responses, strict=True):
            send(sender, response)
        # After the answers have gone: whoever waits for one does not wait for its log.
        self.counts.add_answers(answered)
        if self.feature_log is not None and answered:
            self.feature_log.log(flat, answered, at_ms)
            canary = self.live.snapshot.canary
            if canary is not None and canary.mode == "shadow":
                self.shadow.offer(flat, at_ms)

    def _answer_shadow(self, asks: Sequence[Ask], at_ms: int) -> None:
        asked, answered = answer_shadow(asks, self.live, retrieve, at_ms)
        if self.feature_log is not None:
            self.feature_log.log(asked, answered, at_ms)

    def finalize(self) -> None:
        """Let those that wait have their answer, and stop following."""
        self.waiting.shutdown()
        self.shadow.stop()
        self.live.stop()
        if self.producer is not None:
            self.producer.close()
        self.teller.stop()
        # Metrics that the interpreter ends with, after its link to Triton, end it by a fault.
        self.metrics.close()
        gc.collect()


def logged_share() -> float:
    """Return the share of users whose answers are logged."""
    text = os.environ.get("MOVELINE_FEATURE_LOG__SHARE", str(LOGGED_SHARE_DEFAULT))
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise pb_utils.TritonModelException(
            f"MOVELINE_FEATURE_LOG__SHARE={text}: write a share from 0 (no log) to 1 (every user)."
        )
    return share


def open_producer(counts: Counts) -> FeatureLogProducer | None:
    """Return what sends the feature log, None where no Kafka is given or nobody is to be logged."""
    bootstrap = os.environ.get("MOVELINE_KAFKA__BOOTSTRAP")
    if not bootstrap or not logged_share():
        log.warning("no feature log: MOVELINE_KAFKA__BOOTSTRAP is not set, or the share is 0")
        return None
    text = os.environ.get("MOVELINE_KAFKA__PROPERTIES", "{}")
    try:
        properties = msgspec.json.decode(text, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise pb_utils.TritonModelException(
            f"MOVELINE_KAFKA__PROPERTIES is not a JSON object of texts: {error}"
        ) from error
    topics = Topics(os.environ.get("MOVELINE_KAFKA__PREFIX", DEFAULT_PREFIX))
    producer = FeatureLogProducer(
        KafkaConfig(bootstrap, properties),
        topics.feature_log,
        on_delivered=lambda number: counts.add(LOGGED, number=number),
        on_dropped=lambda number: counts.add(LOG_DROPPED, number=number),
    )
    producer.start()
    return producer


class TritonMetrics:
    """Counters on Triton's metrics page; told from one thread only (scoring/counts.py)."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        # Held for as long as they are counted: Triton forgets a family with its object.
        self.families = {
            metric: pb_utils.MetricFamily(
                name=metric.name,
                description=metric.description,
                kind=pb_utils.MetricFamily.COUNTER,
            )
            for metric in METRICS
        }
        self.counters: dict[tuple[Metric, str], Any] = {}
        # The page shows a counter from its first telling on: these are told from the start.
        for metric in (LOGGED, LOG_DROPPED, SHADOW_DROPPED):
            self.tell(metric, "", 0)

    def tell(self, metric: Metric, label: str, number: float) -> None:
        """Count so many more under a value of the metric's label."""
        place = metric, label
        if place not in self.counters:
            labels = {"instance": self.instance} | ({metric.label: label} if metric.label else {})
            self.counters[place] = self.families[metric].Metric(labels=labels)
        self.counters[place].increment(number)

    def close(self) -> None:
        """Let go of them."""
        self.counters.clear()
        self.families.clear()


def send(sender: Any, response: Any) -> None:  # noqa: ANN401 - Triton's objects are untyped
    """Send a request's one response."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def read_asks(request: Any) -> list[Ask]:  # noqa: ANN401 - Triton's objects are untyped
    """Return the asks of one request, one per user."""
    columns = [read(request, name).flatten().tolist() for name in _INPUTS]
    size, request_id = len(columns[0]), request.request_id()
    candidates = read_optional(request, "candidate_item", [[]] * size)
    in_domain = read_optional(request, "in_domain", [[0]] * size)
    deadline_ms = read_optional(request, "deadline_ms", [[0]] * size)
    return [
        Ask(
            user,
            k,
            partition,
            offset,
            wait_ms,
            bool(exclude_seen),
            request_id,
            tuple(item for item in candidates[row] if item != NO_ITEM),
            in_domain[row][0] % _HASHES,
            deadline_ms[row][0],
        )
        for row, (user, k, partition, offset, wait_ms, exclude_seen) in enumerate(
            zip(*columns, strict=True)
        )
    ]


def read_optional(request: Any, name: str, default: list[list[int]]) -> list[list[int]]:  # noqa: ANN401
    """Return an input's rows, or the default where the request does not carry it."""
    if pb_utils.get_input_tensor_by_name(request, name) is None:
        return default
    rows: list[list[int]] = read(request, name).tolist()
    return rows


def refusal(ask: Ask) -> str | None:
    """Return what is wrong with an ask, None if nothing is."""
    if not 0 < ask.k <= K_MAX:
        return f"k={ask.k}; ask for 1 to {K_MAX} items"
    if len(ask.candidates) > CANDIDATES_MAX:
        return f"{len(ask.candidates)} candidates; rank at most {CANDIDATES_MAX} in one request"
    return None


def is_hurried(ask: Ask) -> bool:
    """Return whether the ask would hurry a batch."""
    return 0 < ask.deadline_ms < _HURRIED_MS


def refuse(message: str) -> Any:  # noqa: ANN401 - Triton's objects are untyped
    """Return an error response that blames the request."""
    return pb_utils.InferenceResponse(
        output_tensors=[], error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
    )


def fail(message: str) -> Any:  # noqa: ANN401 - Triton's objects are untyped
    """Return an error response that blames the server."""
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))


def respond(answers: list[Answered], asks: list[Ask]) -> Any:  # noqa: ANN401 - untyped
    """Return the response tensors, padded to the largest k of the request."""
    width = max(ask.k for ask in asks)
    item_ids = torch.full((len(answers), width), NO_ITEM, dtype=torch.int64)
    scores = torch.full((len(answers), width), float("-inf"))
    for i, one in enumerate(answers):
        item_ids[i, : len(one.item_ids)] = torch.tensor(one.item_ids, dtype=torch.int64)
        scores[i, : len(one.scores)] = torch.tensor(one.scores)
    return pb_utils.InferenceResponse(
        output_tensors=[
            output("item_id", item_ids),
            output("score", scores),
            output("provenance", torch.tensor([one.provenance for one in answers])),
            output("contribution", torch.tensor([one.contribution for one in answers])),
        ]
    )
