"""Where everything is: the only place that reads the environment and config files.

Highest first: an option of the command, an environment variable (MOVELINE_KAFKA__BOOTSTRAP), the
file `moveline.toml` (or MOVELINE_CONFIG), the addresses `moveline up` left in its run folder, the
default. Nothing below this module knows which of them it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from compose.errors import ComposeError
from features.config import DEFAULT_ACTIONS, StateConfig
from features.sources import HALF_LIFE_H_DEFAULT
from scoring.signature import LOGGED_SHARE_DEFAULT

CONFIG_FILE: Final = Path("moveline.toml")
RUN_DIR: Final = Path(".moveline")
ADDRESSES_FILE: Final = "addresses.toml"
_ENV_PREFIX: Final = "MOVELINE_"


class SettingsError(ComposeError):
    """A setting is missing or out of range."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KafkaSettings(_Section):
    """Where the brokers are; `properties` go to librdkafka as they are (TLS, SASL)."""

    bootstrap: str = "127.0.0.1:9092"
    prefix: str = "moveline"
    partitions: int = Field(default=4, ge=1, le=10_000)
    replication: int = Field(default=1, ge=1, le=10)
    properties: dict[str, str] = Field(default_factory=dict)


class RedisSettings(_Section):
    """Where Redis is."""

    url: str = "redis://127.0.0.1:6379/0"


class TritonSettings(_Section):
    """Where Triton is: host:port of gRPC and HTTP; several of gRPC with commas between them."""

    grpc: str = "127.0.0.1:8001"
    http: str = "127.0.0.1:8000"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every server; a version goes live on all of them or on none."""
        return tuple(part.strip() for part in self.grpc.split(",") if part.strip())

    @property
    def address(self) -> str:
        """The server that is asked where any of them will do."""
        return self.addresses[0]


class LakeSettings(_Section):
    """The event log on disk; in the run folder unless given."""

    path: Path = Path("lake")
    flush_s: float = Field(default=2.0, gt=0)


class WorkerSettings(_Section):
    """How the hot worker consumes."""

    instance: str | None = None
    batch_max: int = Field(default=30_000, ge=1, le=100_000)
    batch_wait_s: float = Field(default=0.01, ge=0.001, le=5)
    cache_mb: int = Field(default=256, ge=1, le=1_000_000)
    waiting_chunks_max: int = Field(default=64, ge=1, le=1_000_000)
    # Brokers take no less than 6 s by default, librdkafka no more than it may go unpolled.
    session_timeout_ms: int = Field(default=10_000, ge=1_000, le=300_000)
    metrics_host: str = "0.0.0.0"  # noqa: S104 - Prometheus scrapes from elsewhere
    metrics_port: int = Field(default=9464, ge=0, le=65_535)

    @property
    def cache_bytes(self) -> int:
        """What `cache_mb` is in bytes."""
        return self.cache_mb * 1024 * 1024


class FeatureLogSettings(_Section):
    """Whose answers `recommend` logs, for the skew report; 0 logs nobody's."""

    share: float = Field(default=LOGGED_SHARE_DEFAULT, ge=0, le=1)


class CanarySettings(_Section):
    """By which rules a canary is promoted or taken back; see docs/serving.md."""

    share: float = Field(default=0.05, gt=0, le=0.5)
    users_min: int = Field(default=200, ge=2)
    answers_min: int = Field(default=1_000, ge=1)
    margin: float = Field(default=0.02, ge=0, le=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    failed_margin: float = Field(default=0.01, ge=0, le=1)
    latency_factor: float = Field(default=1.5, ge=1)
    latency_floor_ms: float = Field(default=20.0, ge=0)
    next_events: int = Field(default=5, ge=1, le=1_000)
    window_s: int = Field(default=1_800, ge=1)
    hours_max: float = Field(default=72.0, gt=0)
    check_s: float = Field(default=60.0, gt=0)


class StateSettings(_Section):
    """The rules of a new generation; an existing one keeps those it was built with."""

    recent: int = Field(default=64, ge=1, le=4_096)
    mid: int = Field(default=448, ge=1, le=65_536)
    chunk: int = Field(default=64, ge=1, le=4_096)
    dedup_window: int = Field(default=256, ge=1, le=4_096)
    session_gap_s: int = Field(default=1_800, ge=1)
    actions: list[str] = Field(default_factory=lambda: list(DEFAULT_ACTIONS))
    stream_actions: list[str] = Field(default_factory=lambda: list(DEFAULT_ACTIONS[1:]))


class TrainingSettings(_Section):
    """How models are trained; from `every_s` on, what the trainer service adds to `moveline train`.

    docs/trainer.md says what each decides.
    """

    device: Literal["cpu", "cuda", "auto"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    machine_code: Literal["auto", "never"] = "auto"
    checkpoints: Path = Path("checkpoints")
    checkpoint_every_steps: int = Field(default=500, ge=1)
    tensorboard: Path | None = None
    every_s: float = Field(default=21_600, gt=0)
    every_events: int = Field(default=1_000_000, ge=0)
    full_every_s: float = Field(default=604_800, ge=0)
    window_days: float = Field(default=90, gt=0)
    events_min: int = Field(default=1_000, ge=0)
    lag_max: int = Field(default=100_000, ge=0)
    budget_s: float = Field(default=600, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, ge=1, le=1_024)
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    quality_margin: float = Field(default=0.01, ge=0, le=1)
    latency_ms: float = Field(default=250, gt=0)
    lease_s: float = Field(default=30, ge=1)
    run_s_max: float = Field(default=14_400, gt=0)
    metrics_host: str = "0.0.0.0"  # noqa: S104 - Prometheus scrapes from elsewhere
    metrics_port: int = Field(default=9466, ge=0, le=65_535)


class SourcesSettings(_Section):
    """Live sources beside the model: counted by the near-line app, weighed by training.

    The half-life, in hours, is how long popularity takes to forget half: goods are in season for
    weeks, news for hours.
    """

    half_life_h: int = Field(default=HALF_LIFE_H_DEFAULT, ge=1, le=24 * 365)


class Settings(BaseSettings):
    """Everything a command needs to know of its surroundings."""

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        # A generation may be written as a number.
        coerce_numbers_to_str=True,
    )

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    redis: RedisSettings = Field(default_factory=RedisSettings)
    triton: TritonSettings = Field(default_factory=TritonSettings)
    lake: LakeSettings = Field(default_factory=LakeSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    feature_log: FeatureLogSettings = Field(default_factory=FeatureLogSettings)
    canary: CanarySettings = Field(default_factory=CanarySettings)
    state: StateSettings = Field(default_factory=StateSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    sources: SourcesSettings = Field(default_factory=SourcesSettings)
    model_repository: Path = Path("model_repo")
    models: Path = Path("models")
    run_dir: Path = RUN_DIR
    config: Path = CONFIG_FILE
    generation: Annotated[
        str, BeforeValidator(str), StringConstraints(pattern=r"^g?[1-9][0-9]*$")
    ] = "g1"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources as the module says."""
        del dotenv_settings, file_secret_settings
        given = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        config, run_dir = _locations(given)
        assert isinstance(env_settings, EnvSettingsSource)
        return (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, config),
            TomlConfigSettingsSource(settings_cls, run_dir / ADDRESSES_FILE),
        )

    def model_post_init(self, context: object, /) -> None:
        """Put what was not given a place of its own into the run folder."""
        super().model_post_init(context)
        if "path" not in self.lake.model_fields_set:
            self.lake = self.lake.model_copy(update={"path": self.run_dir / "lake"})
        if "checkpoints" not in self.training.model_fields_set:
            place = {"checkpoints": self.run_dir / "checkpoints"}
            self.training = self.training.model_copy(update=place)
        if "models" not in self.model_fields_set:
            self.models = self.run_dir / "models"

    @property
    def generation_number(self) -> int:
        """3 for both "g3" and "3"."""
        return int(self.generation.removeprefix("g"))

    def state_config(self) -> StateConfig:
        """Return the rules for a generation that does not exist yet."""
        return StateConfig(
            recent=self.state.recent,
            mid=self.state.mid,
            chunk=self.state.chunk,
            dedup_window=self.state.dedup_window,
            session_gap_ms=self.state.session_gap_s * 1000,
            actions=tuple(self.state.actions),
            stream_actions=tuple(self.state.stream_actions),
        )


def _locations(given: dict[str, Any]) -> tuple[Path, Path]:
    """Return the config file and the run folder, which decide where the rest is read from."""
    config = Path(given.get("config", os.environ.get(f"{_ENV_PREFIX}CONFIG", CONFIG_FILE)))
    run_dir = Path(given.get("run_dir", os.environ.get(f"{_ENV_PREFIX}RUN_DIR", RUN_DIR)))
    return config, run_dir


def load_settings(config: Path | None = None, **options: Any) -> Settings:  # noqa: ANN401 - nested
    """Return the settings with the given options on top; an option of None was not given.

    Args:
        config: a TOML file instead of moveline.toml.
        options: sections as nested dicts, as pydantic takes them.

    Raises:
        SettingsError: a file is missing or not TOML, or a value is out of range.
    """
    if config is not None and not config.is_file():
        raise SettingsError(f"config file {config} does not exist: give an existing --config.")
    try:
        settings = Settings(**_without_none({"config": config, **options}))
        settings.state_config()  # refuses rules that no row can hold
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise SettingsError(
            f"settings: {'; '.join(lines)}. See docs/bring_your_own.md for every key."
        ) from error
    except ValueError as error:
        raise SettingsError(f"settings: {error}. Mend the file, or name another.") from error
    return settings


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in options.items():
        inner = _without_none(value) if isinstance(value, dict) else value
        if inner is not None and inner != {}:
            kept[name] = inner
    return kept
