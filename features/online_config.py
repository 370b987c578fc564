"""The online_store section of feature_store.yaml: where Redis is, as we or as Feast spell it."""

from __future__ import annotations

from typing import Final, Self

from feast.infra.online_stores.redis import (
    RedisClient,
    RedisOnlineStore,
    RedisOnlineStoreConfig,
    RedisType,
)
from pydantic import field_validator, model_validator

from features.redis_address import PORT_DEFAULT, SENTINEL_PORT_DEFAULT, RedisAddress, parse_address

URL_DEFAULT: Final = "redis://127.0.0.1:6379/0"
_TYPES: Final = {
    "single": RedisType.redis,
    "unix": RedisType.redis,
    "sentinel": RedisType.redis_sentinel,
    "cluster": RedisType.redis_cluster,
}


class RedisAddressConfig(RedisOnlineStoreConfig):
    """What Feast's own Redis store takes, with our URLs beside its connection strings.

    Attributes:
        connection_string: a URL of docs/bring_your_own.md, which says by itself what it leads to;
            or "host:port,host:port,db=0,password=..." with redis_type and sentinel_master beside
            it. A name that the environment does not define, which Feast leaves as it stands,
            means the default.
    """

    connection_string: str = URL_DEFAULT

    @field_validator("connection_string")
    @classmethod
    def _take_default(cls, value: str) -> str:
        return URL_DEFAULT if value.startswith("$") else value

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> Self:
        if self.client != RedisClient.redis:
            raise ValueError(
                f"client {self.client.value!r}: rows are read through redis-py; leave it out."
            )
        is_url = "://" in self.connection_string
        if is_url and "redis_type" in self.model_fields_set:
            kind = self.address().kind
            if _TYPES[kind] != self.redis_type:
                raise ValueError(
                    f"redis_type is {self.redis_type.value!r}, and the URL leads to another kind: "
                    "write redis+cluster://HOST:PORT or redis+sentinel://HOST:PORT/MASTER, or "
                    "HOST:PORT without a scheme."
                )
        self.address()  # an address that is none is refused here, not at the first read
        return self

    def address(self) -> RedisAddress:
        """Return where Redis is.

        Raises:
            AddressError: the connection string says it in none of its forms.
        """
        if "://" in self.connection_string:
            return parse_address(self.connection_string)
        nodes, options = RedisOnlineStore._parse_connection_string(self.connection_string)  # noqa: SLF001 - as Feast's own
        is_sentinel = self.redis_type == RedisType.redis_sentinel
        port = SENTINEL_PORT_DEFAULT if is_sentinel else PORT_DEFAULT
        url_kind = {RedisType.redis: "redis", RedisType.redis_cluster: "redis+cluster"}
        # Through the URL form, so that both are judged by the same rules.
        scheme = url_kind.get(self.redis_type, "redis+sentinel")
        hosts = ",".join(f"{node['host']}:{node.get('port', port)}" for node in nodes)
        path = f"/{self.sentinel_master}" if is_sentinel else ""
        parsed = parse_address(f"{scheme}://{hosts}{path}")
        return RedisAddress(
            kind=parsed.kind,
            nodes=parsed.nodes,
            master=parsed.master,
            options={**parsed.options, **options},
        )
