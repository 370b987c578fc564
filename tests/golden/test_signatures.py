"""Goal: Triton's configuration, the server's code and the clients mean the same tensors.

A name, type or limit is a promise to callers: change it in all places at once, and say so in
CHANGELOG.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from features.config import StateConfig
from features.events import domain_hash
from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH
from features.view import batch_streams
from scoring import client, signature
from scoring.tensors import retrieval_inputs
from trainer import export
from trainer.models import beam, lifelong, serving
from trainer.models.config import GemsConfig

REPOSITORY = Path(__file__).parents[2]
INT64, FP32 = "TYPE_INT64", "TYPE_FP32"
RECOMMEND_INPUTS = dict.fromkeys(
    ("user_id", "k", "min_partition", "min_offset", "wait_ms", "exclude_seen"), (INT64, (1,))
)
OPTIONAL_INPUTS = {
    "candidate_item": (INT64, (-1,)),
    "in_domain": (INT64, (1,)),
    "deadline_ms": (INT64, (1,)),
}
RECOMMEND_OUTPUTS = {
    "item_id": (INT64, (-1,)),
    "score": (FP32, (-1,)),
    "provenance": (INT64, (7,)),
    "contribution": (FP32, (5,)),
}
STREAM_FIELDS = ("item", "age_ms", "domain", "action", "dwell_ms")
GEMS_INPUTS = {
    **{f"recent_{name}": (INT64, (-1, -1)) for name in STREAM_FIELDS},
    **{f"mid_{name}": (INT64, (-1, -1)) for name in STREAM_FIELDS},
    "lifelong": (FP32, (-1, -1, -1)),
    "lifelong_count": (INT64, (-1, -1)),
    "exclude_item": (INT64, (-1, -1)),
    "candidate_item": (INT64, (-1, -1)),
    "in_domain": (INT64, (-1, -1)),
    "counted_item": (INT64, (-1, -1, -1)),
    "counted_share": (FP32, (-1, -1, -1)),
    "counted_domain": (INT64, (-1, -1)),
    "withdrawn": (INT64, (-1,)),
}
LIFELONG_INPUTS = dict.fromkeys(
    ("item", "action", "domain", "dwell_ms", "event_time_ms"), (INT64, (-1, -1))
)
LIFELONG_OUTPUTS = {"state": (FP32, (-1, 64, 64)), "count": (INT64, (-1, 1))}
GEMS_OUTPUTS = {
    "item_id": (INT64, (-1, -1)),
    "score": (FP32, (-1, -1)),
    "contribution": (FP32, (-1, 5)),
}


def read_config(model: str) -> Any:  # noqa: ANN401 - generated protobuf
    """Return a model's config.pbtxt as Triton's own message; an unknown field raises."""
    text = (REPOSITORY / "model_repo" / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(fields: Any) -> dict[str, tuple[str, tuple[int, ...]]]:  # noqa: ANN401 - likewise
    """Return name -> (type, dims)."""
    return {
        field.name: (model_config_pb2.DataType.Name(field.data_type), tuple(field.dims))
        for field in fields
    }


@pytest.mark.parametrize("model", [signature.RECOMMEND_MODEL, signature.RETRIEVAL_MODEL])
def test_the_folder_is_the_name_and_the_backend_is_python(model: str) -> None:
    config = read_config(model)
    assert (config.name, config.backend) == (model, "python")


def test_recommend() -> None:
    config = read_config("recommend")
    assert tensors(config.input) == RECOMMEND_INPUTS | OPTIONAL_INPUTS
    assert {one.name for one in config.input if one.optional} == set(OPTIONAL_INPUTS)
    assert tensors(config.output) == RECOMMEND_OUTPUTS
    assert config.max_batch_size == signature.USERS_MAX == 64
    assert list(config.version_policy.specific.versions) == [1]
    assert len(signature.PROVENANCE) == 7


def test_gems() -> None:
    config = read_config("gems")
    assert tensors(config.input) == GEMS_INPUTS
    assert tensors(config.output) == GEMS_OUTPUTS
    # 0: the batch is the first dimension of every tensor but `withdrawn`.
    assert config.max_batch_size == 0
    # What has to be loaded is what the folder holds: a publication sees to that.
    assert config.version_policy.WhichOneof("policy_choice") == "all"


def test_lifelong() -> None:
    config = read_config("lifelong")
    assert (config.name, config.backend) == (signature.LIFELONG_MODEL, "python")
    assert tensors(config.input) == LIFELONG_INPUTS
    assert tensors(config.output) == LIFELONG_OUTPUTS
    assert config.max_batch_size == 0
    # What has to be loaded is what the folder holds: a publication sees to that.
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    exported = serving.compressor_input_signature()
    assert [spec.name for spec in exported] == list(LIFELONG_INPUTS)
    state, count = serving.compressor_output_signature()
    assert (state.name, count.name) == tuple(LIFELONG_OUTPUTS)


def test_provenance_and_degraded_flags() -> None:
    assert signature.PROVENANCE == (
        "model_version",
        "live_version",
        "generation",
        "ordinal",
        "newest_event_time_ms",
        "newest_event_age_ms",
        "degraded",
    )
    assert {flag.name: flag.value for flag in signature.Degraded} == {
        "UNKNOWN_USER": 1,
        "STORE_AWAY": 2,
        "MODEL_AWAY": 4,
        "POSITION_NOT_REACHED": 8,
        "FEW_CANDIDATES": 16,
        "LIFELONG": 32,
        "MID_TERM": 64,
        "DEADLINE": 128,
        "NO_TRENDING": 256,
    }


def test_the_client_sends_what_recommend_takes() -> None:
    options = client._Options(
        k=10,
        min_position=(3, 20),
        exclude_seen=True,
        deadline_s=1.0,
        candidates=[7, 8, 9],
        domain="home",
    )
    ask = client._make_ask([42, 43], options)
    assert list(ask.inputs) == [*RECOMMEND_INPUTS, *OPTIONAL_INPUTS]
    assert {array.dtype for array in ask.inputs.values()} == {np.dtype(np.int64)}
    shapes = {name: array.shape for name, array in ask.inputs.items()}
    assert shapes.pop("candidate_item") == (2, 3)
    assert set(shapes.values()) == {(2, 1)}
    assert ask.inputs["in_domain"].view(np.uint64).tolist() == [[domain_hash("home")]] * 2
    plain = client._make_ask([42], replace(options, candidates=None, domain=None))
    assert list(plain.inputs) == [*RECOMMEND_INPUTS, "deadline_ms"]
    # What is left once a slot is free, less the way back.
    assert client._tensors(plain, 0.5)[-1].shape() == [1, 1]
    assert plain.inputs["deadline_ms"].tolist() == [[450]]
    assert plain.inputs["wait_ms"].tolist() == [[450]]
    client._tensors(plain, 0.05)
    assert plain.inputs["deadline_ms"].tolist() == [[45]]
    assert list(client._OUTPUTS) == list(RECOMMEND_OUTPUTS)


def test_recommend_sends_what_gems_takes() -> None:
    config = StateConfig()
    sent = retrieval_inputs(batch_streams([], 0, config), [], frozenset({8, 7}))
    assert list(sent) == list(GEMS_INPUTS)
    kinds = {torch.int64: INT64, torch.float32: FP32}
    for name, tensor in sent.items():
        assert (kinds[tensor.dtype], tensor.dim()) == (
            GEMS_INPUTS[name][0],
            len(GEMS_INPUTS[name][1]),
        )
    assert sent["recent_item"].shape == (0, config.recent)
    assert sent["mid_item"].shape == (0, config.mid)
    assert sent["withdrawn"].tolist() == [signature.NO_ITEM, 7, 8]


def test_what_trainer_exports_is_what_gems_is_sent() -> None:
    """Only `available` differs: gems makes it from `withdrawn`."""
    exported = serving.input_signature(GemsConfig(), num_items=5)
    assert [spec.name for spec in exported] == [*list(GEMS_INPUTS)[:-1], "available"]
    sent = retrieval_inputs(batch_streams([], 0, StateConfig()), [], frozenset())
    for spec in exported[:-1]:
        assert tuple(sent[spec.name].shape[1:]) == spec.shape, spec.name
    assert [spec.name for spec in serving.output_signature()] == list(GEMS_OUTPUTS)


def test_limits_that_two_packages_name_are_equal() -> None:
    """A model's graph and the server that feeds it are built apart; here they are held together."""
    assert beam.K_MAX == signature.K_MAX == 100
    assert serving.NUM_EXCLUDED == signature.NUM_EXCLUDED == 512
    assert signature.CANDIDATES_MAX == signature.NUM_EXCLUDED
    assert serving.PADDING == signature.NO_ITEM == -1
    assert export.MAX_BATCH == signature.USERS_MAX == 64
    assert lifelong.NUM_ROWS == LIFELONG_ROWS == 64
    assert lifelong.VALUE_WIDTH == LIFELONG_WIDTH == 64
