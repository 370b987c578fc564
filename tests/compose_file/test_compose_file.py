"""Goal: a compose file that cannot be run here is as right as reading can make it.

The official Compose schema says whether it is well-formed (check-jsonschema carries a copy); the
laws below say what the schema cannot: references that resolve, versions that stay, servers that
are probed. Each law is also shown to refuse a file that breaks it.
"""

import base64
import copy
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

# The environment names of the project's settings (compose/settings.py).
SETTINGS = frozenset(
    {
        "MOVELINE_KAFKA__BOOTSTRAP",
        "MOVELINE_REDIS__URL",
        "MOVELINE_TRITON__GRPC",
        "MOVELINE_TRITON__HTTP",
        "MOVELINE_LAKE__PATH",
        "MOVELINE_MODEL_REPOSITORY",
        "MOVELINE_MODELS",
        "MOVELINE_GENERATION",
    },
)
# Sub-commands of the console script that the services call.
COMMANDS = frozenset({"worker", "nearline", "lake", "trainer run", "topics create"})
# Ends with a version of at least two numbers: "26.08-py3", "v3.14.0", "8.2.10-bookworm".
PINNED = re.compile(r"^[\w./-]+:v?\d+\.\d+[\w.-]*$")
# A lone dollar; "$$" is Compose's way to write a plain one.
INTERPOLATION = re.compile(r"(?<!\$)(?:\$\$)*\$(?!\$)")

Services = dict[str, dict[str, Any]]
Law = Callable[[dict[str, Any]], list[str]]


def one_shot(service: dict[str, Any]) -> bool:
    """True of a service that is meant to end."""
    return service.get("restart") == "no"


def schema_errors(document: dict[str, Any]) -> list[str]:
    """What the official schema has against the document."""
    # Found without importing: its command line wants a newer click than Faust lets us have.
    spec = importlib.util.find_spec("check_jsonschema")
    assert spec is not None
    assert spec.origin is not None
    vendored = Path(spec.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def unpinned_images(document: dict[str, Any]) -> list[str]:
    """Services whose image could be another one tomorrow."""
    services: Services = document["services"]
    return [name for name, it in services.items() if not PINNED.match(it.get("image", ""))]


def unprobed_services(document: dict[str, Any]) -> list[str]:
    """Long-running services without a health check, or with one that is switched off."""
    services: Services = document["services"]
    return [
        name
        for name, it in services.items()
        if not one_shot(it) and (not it.get("healthcheck", {}).get("test"))
    ]


def unrestarted_services(document: dict[str, Any]) -> list[str]:
    """Long-running services that stay down after a crash, or are killed when asked to stop."""
    services: Services = document["services"]
    return [
        name
        for name, it in services.items()
        if not one_shot(it)
        and (it.get("restart") != "unless-stopped" or "stop_grace_period" not in it)
    ]


def mounts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(service, source) of every mount, all in the short form."""
    services: Services = document["services"]
    for name, it in services.items():
        for mount in it.get("volumes", []):
            yield name, mount.split(":", 1)[0]


def undeclared_volumes(document: dict[str, Any]) -> list[str]:
    """Named volumes used and not declared, or declared and not used."""
    used = {source for _, source in mounts(document) if not source.startswith(".")}
    return sorted(used ^ set(document["volumes"]))


def unknown_settings(document: dict[str, Any]) -> list[str]:
    """Variables in our name that the settings do not have."""
    services: Services = document["services"]
    return [
        f"{name}: {variable}"
        for name, it in services.items()
        for variable in it.get("environment", {})
        if variable.startswith("MOVELINE_") and variable not in SETTINGS
    ]


def broken_dependencies(document: dict[str, Any]) -> list[str]:
    """Dependencies on nothing, on the health of what has no probe, or on the end of a server."""
    services: Services = document["services"]
    broken = []
    for name, it in services.items():
        for other, how in it.get("depends_on", {}).items():
            condition = how["condition"]
            target = services.get(other)
            fits = target is not None and (
                (condition == "service_healthy" and "healthcheck" in target)
                or (condition == "service_completed_successfully" and one_shot(target))
            )
            if not fits:
                broken.append(f"{name} -> {other} ({condition})")
    return broken


def open_ports(document: dict[str, Any]) -> list[str]:
    """Ports that the whole network could reach; no server here asks for a password."""
    services: Services = document["services"]
    return [
        f"{name}: {port}"
        for name, it in services.items()
        for port in it.get("ports", [])
        if not port.startswith("127.0.0.1:")
    ]


def interpolated_values(document: dict[str, Any]) -> list[str]:
    """Values with a dollar that Compose would replace: by nothing, where the variable is unset."""
    text = json.dumps(document["services"])
    return INTERPOLATION.findall(text)


def break_schema(document: dict[str, Any]) -> None:
    document["services"]["redis"]["health_check"] = {}


def break_image(document: dict[str, Any]) -> None:
    document["services"]["redis"]["image"] = "redis:latest"


def break_probe(document: dict[str, Any]) -> None:
    del document["services"]["kafka"]["healthcheck"]


def break_restart(document: dict[str, Any]) -> None:
    del document["services"]["lake"]["stop_grace_period"]


def break_volume(document: dict[str, Any]) -> None:
    del document["volumes"]["lake"]


def break_setting(document: dict[str, Any]) -> None:
    document["services"]["worker"]["environment"]["MOVELINE_REDIS_URL"] = "redis://redis"


def break_dependency(document: dict[str, Any]) -> None:
    document["services"]["worker"]["depends_on"]["zookeeper"] = {"condition": "service_healthy"}


def break_port(document: dict[str, Any]) -> None:
    document["services"]["redis"]["ports"] = ["6379:6379"]


def break_interpolation(document: dict[str, Any]) -> None:
    document["services"]["redis"]["command"] = ["redis-server", "--port", "$PORT"]


LAWS = [
    (schema_errors, break_schema),
    (unpinned_images, break_image),
    (unprobed_services, break_probe),
    (unrestarted_services, break_restart),
    (undeclared_volumes, break_volume),
    (unknown_settings, break_setting),
    (broken_dependencies, break_dependency),
    (open_ports, break_port),
    (interpolated_values, break_interpolation),
]


@pytest.mark.parametrize("law", [law for law, _ in LAWS])
def test_the_file_keeps_the_law(law: Law, compose_file: dict[str, Any]) -> None:
    assert law(compose_file) == []


@pytest.mark.parametrize(("law", "break_it"), LAWS)
def test_the_law_refuses_a_broken_file(
    law: Law,
    break_it: Callable[[dict[str, Any]], None],
    compose_file: dict[str, Any],
) -> None:
    broken = copy.deepcopy(compose_file)
    break_it(broken)
    assert law(broken) != []


@pytest.mark.parametrize("tag", ["redis", "redis:latest", "redis:8", "grafana/grafana:main"])
def test_a_tag_that_moves_is_not_pinned(tag: str) -> None:
    assert not PINNED.match(tag)


def test_every_server_and_service_of_the_stack_is_there(compose_file: dict[str, Any]) -> None:
    assert set(compose_file["services"]) == {
        "kafka",
        "redis",
        "model-files",
        "triton",
        "topics",
        "worker",
        "nearline",
        "lake",
        "trainer",
        "prometheus",
        "grafana",
    }


def test_our_services_are_given_every_setting(compose_file: dict[str, Any]) -> None:
    for name in ("topics", "worker", "nearline", "lake", "trainer", "triton"):
        assert set(compose_file["services"][name]["environment"]) == SETTINGS


def test_settings_lead_to_ports_that_services_listen_on(compose_file: dict[str, Any]) -> None:
    services: Services = compose_file["services"]
    settings = services["worker"]["environment"]
    kafka_host, kafka_port = settings["MOVELINE_KAFKA__BOOTSTRAP"].split(":")
    assert f"://:{kafka_port}," in services[kafka_host]["environment"]["KAFKA_LISTENERS"]
    advertised = services[kafka_host]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert settings["MOVELINE_KAFKA__BOOTSTRAP"] in advertised
    assert settings["MOVELINE_REDIS__URL"] == "redis://redis:6379/0"
    for key, port in (("GRPC", "8001"), ("HTTP", "8000")):
        host, seen = settings[f"MOVELINE_TRITON__{key}"].split(":")
        assert seen == port
        assert f"127.0.0.1:{port}:{port}" in services[host]["ports"]


def test_paths_in_settings_are_mounted_where_they_are_used(compose_file: dict[str, Any]) -> None:
    services: Services = compose_file["services"]
    assert "lake:/lake" in services["lake"]["volumes"]
    assert "lake:/lake:ro" in services["worker"]["volumes"]
    trainer = {"lake:/lake:ro", "models:/models", "packages:/packages"}
    assert trainer <= set(services["trainer"]["volumes"])
    assert services["trainer"]["environment"]["MOVELINE_MODELS"] == "/packages"
    assert "models:/models:ro" in services["triton"]["volumes"]
    assert "--model-repository=/models" in services["triton"]["command"]


def test_mounted_files_exist(compose_file: dict[str, Any], repository: Path) -> None:
    sources = [source for _, source in mounts(compose_file) if source.startswith(".")]
    assert sources
    assert [it for it in sources if not (repository / "compose" / it).exists()] == []


def test_services_call_commands_that_the_console_script_has(compose_file: dict[str, Any]) -> None:
    services: Services = compose_file["services"]
    servers = ("worker", "nearline", "lake", "trainer", "topics")
    assert {" ".join(services[name]["command"]) for name in servers} == COMMANDS


def test_our_images_carry_the_version_of_the_project(
    compose_file: dict[str, Any],
    repository: Path,
) -> None:
    with (repository / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    built = {it["image"] for it in compose_file["services"].values() if "build" in it}
    assert built == {f"moveline:{version}", f"moveline-triton:{version}"}


def test_redis_keeps_what_it_acknowledged(compose_file: dict[str, Any]) -> None:
    command = compose_file["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"


def test_triton_serves_only_what_was_published(compose_file: dict[str, Any]) -> None:
    triton = compose_file["services"]["triton"]
    assert "--model-control-mode=explicit" in triton["command"]
    assert triton["shm_size"] == "1gb"


def test_kafka_is_one_kraft_node_with_a_valid_cluster_id(compose_file: dict[str, Any]) -> None:
    environment = compose_file["services"]["kafka"]["environment"]
    assert environment["KAFKA_PROCESS_ROLES"] == "broker,controller"
    # KRaft's cluster ids are 16 bytes in unpadded URL-safe base64.
    assert len(base64.urlsafe_b64decode(environment["CLUSTER_ID"] + "==")) == 16
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert all(isinstance(value, str) for value in environment.values())
