"""A canary from its start to its end: the pointers that name it, and the figures that decide."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from compose.canary_figures import CanaryLog, Window, figures
from compose.canary_rules import ArmFigures, Decision, Rules, Verdict, decide
from compose.cli.options import kafka_of, stores_of
from compose.errors import ComposeError
from compose.memories import MANIFEST, make_ready, memory_of
from compose.publishing import give_up, prepare
from compose.serving import open_servers, point
from features.clock import now_ms
from features.errors import SchemaMismatchError
from features.redis import Canary, Pointers
from features.schema import schema_hash
from scoring.signature import RETRIEVAL_MODEL
from streams.control import claim_token, read_pointers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compose.settings import Settings
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

_HOUR_MS: Final = 3_600_000


class CanaryError(ComposeError):
    """A canary cannot be started, or there is none."""


@dataclass(frozen=True)
class CanaryRequest:
    """How a version is tried.

    Attributes:
        share: of users; None takes `canary.share` of the settings.
        mode: `shadow` shows nobody its answers.
    """

    share: float | None = None
    mode: Literal["canary", "shadow"] = "canary"


@dataclass(frozen=True)
class CanaryState:
    """A canary, what its arms came to, and what the rules say."""

    pointers: Pointers
    canary: Canary
    control: ArmFigures
    tried: ArmFigures
    verdict: Verdict


class CanaryWatch:
    """Looks at the canary that runs, again and again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.kafka, self.topics = kafka_of(settings)
        self._log: CanaryLog | None = None

    def look(self) -> CanaryState | None:
        """Return how the canary stands; None where none runs.

        Raises:
            StreamError: Kafka does not answer.
        """
        pointers = read_pointers(self.kafka, self.topics)
        if pointers is None or pointers.canary is None:
            return None
        canary = pointers.canary
        if self._log is None or self._log.canary != canary:
            store = stores_of(self.settings)[0]
            self._log = CanaryLog(self.kafka, self.topics, canary, store.config, None)
        at_ms = now_ms()
        self._log.read(at_ms)
        rules = self.settings.canary
        window = Window(next_events=rules.next_events, window_ms=rules.window_s * 1000)
        control, tried = figures(self._log.answers, self._log.events, window)
        verdict = decide(rules_of(self.settings), control, tried, age_ms=at_ms - canary.since_ms)
        return CanaryState(pointers, canary, control, tried, verdict)

    def run(self, report: Callable[[CanaryState], None]) -> CanaryState | None:
        """Look until the rules decide, and do what they say; return what they went by.

        None where no canary runs, or somebody ended it meanwhile.

        Raises:
            StreamError: Kafka does not answer.
        """
        while True:
            state = self.look()
            if state is None:
                return None
            report(state)
            if act(self.settings, state):
                return state
            time.sleep(self.settings.canary.check_s)


def rules_of(settings: Settings) -> Rules:
    """Return the rules as configured."""
    canary = settings.canary
    return Rules(
        users_min=canary.users_min,
        answers_min=canary.answers_min,
        margin=canary.margin,
        alpha=canary.alpha,
        failed_margin=canary.failed_margin,
        latency_factor=canary.latency_factor,
        latency_floor_ms=canary.latency_floor_ms,
        age_ms_max=canary.hours_max * _HOUR_MS,
    )


def start(settings: Settings, version: int, request: CanaryRequest) -> Canary:
    """Try a version that Triton has loaded on a share of users; return once answers follow.

    Raises:
        CanaryError: nothing is live to compare with, it is live itself, another one runs, or
            Triton has not loaded it.
        SchemaMismatchError: it was trained on other features than the live generation has.
        MemoryVersionError: too many users lack memories of the version that it reads.
    """
    kafka, topics = kafka_of(settings)
    token = claim_token(kafka, topics, "canary")
    live = _live(kafka, topics)
    _refuse_second(live)
    if version == live.model_version:
        raise CanaryError(f"version {version} is live: try another one, see `moveline status`.")
    with open_servers(settings) as servers:
        if not all(server.is_ready(RETRIEVAL_MODEL, version) for server in servers):
            raise CanaryError(
                f"Triton at {settings.triton.grpc} has not loaded version {version} of "
                f"`{RETRIEVAL_MODEL}`: see `moveline models`, or bring a package with "
                "`moveline canary start --package FOLDER`."
            )
    _refuse_other_schema(settings, live, version)
    memory = memory_of(settings.model_repository, version)
    if memory is not None and memory.memory_version != live.memory_version:
        make_ready(settings, kafka, topics, live.generation, memory)
    memory_version = memory.memory_version if memory else None
    return _try(settings, live, _canary(settings, version, memory_version, request), token)


def start_package(settings: Settings, package: Path, request: CanaryRequest) -> Canary:
    """Bring a package into every Triton and try it: no step of publishing is left out but the last.

    Raises:
        CanaryError: nothing is live to compare with, or another version is tried.
        ComposeError, TrainerError: as `compose.publishing.prepare`.
    """
    kafka, topics = kafka_of(settings)
    token = claim_token(kafka, topics, "canary")
    live = _live(kafka, topics)
    _refuse_second(live)
    ready = prepare(settings, package, token)
    version, memory_version = ready.published.version, ready.pointers.memory_version
    try:
        return _try(settings, live, _canary(settings, version, memory_version, request), token)
    except BaseException:
        give_up(settings, ready)
        raise


def _canary(
    settings: Settings, version: int, memory_version: str | None, request: CanaryRequest
) -> Canary:
    share = request.share or settings.canary.share
    return Canary(version, memory_version, request.mode, share, now_ms())


def _try(settings: Settings, live: Pointers, canary: Canary, token: int) -> Canary:
    kafka, topics = kafka_of(settings)
    _move(settings, kafka, topics, msgspec.structs.replace(live, canary=canary, token=token))
    return canary


def _refuse_second(live: Pointers) -> None:
    if live.canary is not None:
        raise CanaryError(
            f"version {live.canary.version} is being tried already: end that first with "
            "`moveline canary stop` or `moveline canary promote`."
        )


def promote(settings: Settings) -> Canary:
    """Make the version that is tried the live one; raises CanaryError if none is."""
    kafka, topics = kafka_of(settings)
    token = claim_token(kafka, topics, "canary")
    live, canary = _running(kafka, topics)
    after = msgspec.structs.replace(
        live,
        model_version=canary.version,
        memory_version=canary.memory_version,
        canary=None,
        token=token,
    )
    _move(settings, kafka, topics, after)
    return canary


def stop(settings: Settings) -> Canary:
    """Try the version no longer; what is live stays. Raises CanaryError if none is tried."""
    kafka, topics = kafka_of(settings)
    token = claim_token(kafka, topics, "canary")
    live, canary = _running(kafka, topics)
    _move(settings, kafka, topics, msgspec.structs.replace(live, canary=None, token=token))
    return canary


def act(settings: Settings, state: CanaryState) -> bool:
    """Do what the rules say; return whether the canary has ended."""
    if state.verdict.decision is Decision.PROMOTE:
        promote(settings)
    elif state.verdict.decision is Decision.TAKE_BACK:
        stop(settings)
    return state.verdict.decision is not Decision.GO_ON


def _move(settings: Settings, kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> None:
    """The pointers are these, and every answer follows them: the one place that moves them."""
    point(settings, kafka, topics, pointers)


def _live(kafka: KafkaConfig, topics: Topics) -> Pointers:
    pointers = read_pointers(kafka, topics)
    if pointers is None or pointers.model_version is None:
        raise CanaryError("no version is live to compare with: run `moveline publish` first.")
    return pointers


def _running(kafka: KafkaConfig, topics: Topics) -> tuple[Pointers, Canary]:
    pointers = _live(kafka, topics)
    if pointers.canary is None:
        raise CanaryError("no version is being tried: start one with `moveline canary start`.")
    return pointers, pointers.canary


def _refuse_other_schema(settings: Settings, live: Pointers, version: int) -> None:
    path = settings.model_repository / RETRIEVAL_MODEL / str(version) / MANIFEST
    try:
        manifest: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError) as error:
        raise CanaryError(f"{path} cannot be read ({error}): publish the model again.") from error
    config = stores_of(settings)[1].recorded_config(live.generation) or settings.state_config()
    held, wanted = schema_hash(config), manifest.get("feature_schema_hash")
    if held != wanted:
        raise SchemaMismatchError(
            f"version {version} was trained on features {wanted}, generation g{live.generation} "
            f"has {held}: train on this generation with `moveline train`."
        )
