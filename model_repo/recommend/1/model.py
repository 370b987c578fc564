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
from scoring.feature_log import FeatureLog
from scoring.live import Live
from scoring.recommend import Answered, Ask, RetrievalError, Retrieved, answer
from scoring.signature import K_MAX, LOGGED_SHARE_DEFAULT, NO_ITEM, RETRIEVAL_MODEL
from scoring.tensors import retrieval_inputs
from streams.feature_log import FeatureLogProducer
from streams.properties import KafkaConfig
from streams.topics import DEFAULT_PREFIX, Topics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from features.sources import Counted
    from features.view import StreamBatch

log = logging.getLogger("moveline.recommend")

_INPUTS = ("user_id", "k", "min_partition", "min_offset", "wait_ms", "exclude_seen")
# Redis beyond this is "away" for an answer: trending now beats state later.
_REDIS_TIMEOUT_S = 0.25
# Requests of one instance that wait for a position at a time; a thread and a Redis connection
# each. One more waits for a thread first, within its deadline.
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
    counted: Counted,
) -> Retrieved:
    """Ask one pinned version of the retrieval model, inside the same server."""
    inputs = retrieval_inputs(streams, excluded, withdrawn, counted=counted)
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
        self.producer = open_producer(args["model_instance_name"])
        self.feature_log = (
            FeatureLog(share=logged_share(), send=self.producer.send) if self.producer else None
        )
        self.waiting = ThreadPoolExecutor(_WAITING_MAX, thread_name_prefix="moveline-wait")

    def execute(self, requests: list[Any]) -> None:
        """Answer every request; those that wait for a position do so in a thread each.

        They are batched with others and are more than there are instances: waiting in here would
        hold up everybody. Their number is bounded by Triton's queue and the clients' slots.
        """
        quick: list[tuple[Any, list[Ask]]] = []
        for request in requests:
            sender, asks = request.get_response_sender(), read_asks(request)
            wrong = next((ask for ask in asks if not 0 < ask.k <= K_MAX), None)
            if wrong is not None:
                send(sender, refuse(f"k={wrong.k}; ask for 1 to {K_MAX} items"))
            elif any(ask.min_partition >= 0 for ask in asks):
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
        if self.feature_log is not None and answered:
            self.feature_log.log(flat, answered, at_ms)

    def finalize(self) -> None:
        """Let those that wait have their answer, and stop following."""
        self.waiting.shutdown()
        self.live.stop()
        if self.producer is not None:
            self.producer.close()
        # Metrics that the interpreter ends with, after its link to Triton, end it by a fault.
        self.producer = self.feature_log = None
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


def open_producer(instance: str) -> FeatureLogProducer | None:
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
        on_delivered=counter("moveline_feature_log_records_total", "Answers logged.", instance),
        on_dropped=counter(
            "moveline_feature_log_dropped_total", "Answers whose log was dropped.", instance
        ),
    )
    producer.start()
    return producer


def counter(name: str, description: str, instance: str) -> Callable[[int], None]:
    """Return what counts so many more on Triton's metrics page."""
    family = pb_utils.MetricFamily(
        name=name, description=description, kind=pb_utils.MetricFamily.COUNTER
    )
    metric = family.Metric(labels={"instance": instance})

    def count(number: int) -> None:
        assert family  # held for as long as it is counted: Triton forgets a family with its object
        metric.increment(number)

    return count


def send(sender: Any, response: Any) -> None:  # noqa: ANN401 - Triton's objects are untyped
    """Send a request's one response."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def read_asks(request: Any) -> list[Ask]:  # noqa: ANN401 - Triton's objects are untyped
    """Return the asks of one request, one per user."""
    columns = [read(request, name).flatten().tolist() for name in _INPUTS]
    request_id = request.request_id()
    return [
        Ask(user, k, partition, offset, wait_ms, bool(exclude_seen), request_id)
        for user, k, partition, offset, wait_ms, exclude_seen in zip(*columns, strict=True)
    ]


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
