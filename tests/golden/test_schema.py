"""Goal: the feature contract changes only on purpose.

When `test_the_schema_hash` fails, a feature, a default rule or the row format has changed, and
every model that was trained before carries another hash. If that was the intention: write into
CHANGELOG.md that models have to be trained again (and, if a rule of StateConfig changed, that
generations recorded under the old rules are refused by the worker), then put the new hash here
and there. If it was not: undo the change.
"""

import msgspec
import pyarrow as pa

from features.config import StateConfig, config_from_json
from features.lake import LAKE_SCHEMA, file_name
from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH, LiveMemory
from features.redis import Pointers, Trending
from features.schema import SERVICES, schema_hash, views

CONFIG_JSON = (
    b'{"actions":["impression","click","view","like","dislike","cart","purchase","rating"],'
    b'"chunk":64,"dedup_window":256,"future_tolerance_ms":300000,"mid":448,"recent":64,'
    b'"session_gap_ms":1800000,"session_max_ms":86400000,'
    b'"stream_actions":["click","view","like","dislike","cart","purchase","rating"]}'
)


def test_the_schema_hash() -> None:
    assert schema_hash(StateConfig()) == "7f69043ab68ce8e8"


def test_what_a_model_reads_is_as_large_as_its_place_in_the_schema() -> None:
    shapes = {f.name: f.shape for view in views(StateConfig()) for f in view.features}
    assert shapes["lifelong_memory"] == (LIFELONG_ROWS, LIFELONG_WIDTH)
    assert shapes["recent_item_id"] == (64,)


def test_services_name_views() -> None:
    names = {view.name for view in views(StateConfig())}
    assert {view for of_service in SERVICES.values() for view in of_service} == names
    assert {"gems", "hpgr", "amen", "recommend"} <= set(SERVICES)


def test_the_schema_hash_follows_the_rules() -> None:
    hashes = {
        schema_hash(config)
        for config in (
            StateConfig(),
            StateConfig(recent=65),
            StateConfig(session_gap_ms=1),
            StateConfig(stream_actions=("click",)),
        )
    }
    assert len(hashes) == 4


def test_the_recorded_rules_of_a_generation() -> None:
    """A worker compares these bytes, so another spelling would refuse its own generation."""
    assert StateConfig().to_json() == CONFIG_JSON
    assert config_from_json(CONFIG_JSON) == StateConfig()


def test_pointers_and_trending() -> None:
    assert msgspec.json.encode(Pointers(3, 1)) == b'{"model_version":3,"generation":1}'
    assert msgspec.json.encode(Pointers(None, 2)) == b'{"model_version":null,"generation":2}'
    with_memory = b'{"model_version":3,"generation":1,"memory_version":"00ff00ff00ff00ff"}'
    assert msgspec.json.encode(Pointers(3, 1, "00ff00ff00ff00ff")) == with_memory
    assert msgspec.json.decode(with_memory, type=Pointers).memory_version == "00ff00ff00ff00ff"
    memories = b'[{"memory_version":"00ff00ff00ff00ff","lifelong_model_version":3}]'
    assert msgspec.json.encode([LiveMemory("00ff00ff00ff00ff", 3)]) == memories
    trending = b'{"item_ids":[7,8],"scores":[0.5,0.25]}'
    assert msgspec.json.encode(Trending((7, 8), (0.5, 0.25))) == trending


def test_the_lake_schema_and_its_file_names() -> None:
    text = pa.dictionary(pa.int32(), pa.string())
    assert [(field.name, field.type, field.nullable) for field in LAKE_SCHEMA] == [
        ("offset", pa.int64(), False),
        ("append_time_ms", pa.int64(), False),
        ("user_id", pa.int64(), False),
        ("item_id", pa.int64(), False),
        ("action", text, False),
        ("event_time_ms", pa.int64(), False),
        ("event_hash", pa.uint64(), False),
        ("event_id", pa.string(), False),
        ("domain", text, True),
        ("dwell_ms", pa.int32(), True),
        ("value", pa.float32(), True),
        ("request_id", pa.string(), True),
        ("position", pa.int32(), True),
    ]
    assert file_name(65536, 131071) == "00000000000000065536-00000000000000131071.parquet"
