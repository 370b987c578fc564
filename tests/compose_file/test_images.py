"""Goal: the Dockerfiles copy what exists, and Triton's image has all that its models import.

Nothing is built. The imports of model_repo's python models are followed through our packages by
reading them, so that a new import fails here and not in somebody's container.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FIRST_PARTY = ("features", "streams", "trainer", "scoring", "compose")
# Triton itself puts this module on the path of its python models.
GIVEN_BY_TRITON = frozenset({"triton_python_backend_utils"})
DOCKERFILES = ("moveline", "triton")
PINNED_BASE = re.compile(r"^[\w./-]+:\d+\.\d+[\w.-]*$")


def instructions(dockerfile: Path) -> list[tuple[str, list[str]]]:
    """(instruction, words) of a Dockerfile, continued lines joined and comments dropped."""
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    words = [line.split() for line in joined.splitlines() if line.strip()]
    return [(first, rest) for first, *rest in words]


def copied_paths(dockerfile: Path) -> list[str]:
    """Sources of every COPY, relative to the build context."""
    return [
        source
        for instruction, words in instructions(dockerfile)
        if instruction == "COPY"
        for source in words[:-1]
        if not source.startswith("--")
    ]


def installed_in_triton(dockerfile: Path) -> set[str]:
    """Distributions that the Dockerfile names for requirements.py."""
    (line,) = [
        words
        for instruction, words in instructions(dockerfile)
        if instruction == "RUN" and "requirements.py" in words
    ]
    start = line.index("pyproject.toml") + 1
    return set(line[start : line.index(">")])


def imported_modules(source: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports when it is imported."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_files(root: Path, module: str) -> list[Path]:
    """Files that importing `module` runs: its packages' __init__ and itself, where they exist."""
    parts = module.split(".")
    folders = [root.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
    candidates = [folder / "__init__.py" for folder in folders]
    candidates.append(folders[-1].with_suffix(".py"))
    return [path for path in candidates if path.is_file()]


def reached_imports(root: Path, starts: list[Path]) -> set[str]:
    """Top-level names that `starts` import, through our modules, less the standard library."""
    names: set[str] = set()
    seen: set[Path] = set()
    waiting = list(starts)
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        for module in imported_modules(source):
            top = module.split(".", 1)[0]
            names.add(top)
            if top in FIRST_PARTY:
                waiting.extend(module_files(root, module))
    return names - set(sys.stdlib_module_names) - GIVEN_BY_TRITON


def python_models(root: Path) -> list[Path]:
    """Every model.py in the model repository."""
    return sorted((root / "model_repo").glob("*/*/model.py"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_base_image_is_pinned(name: str, repository: Path) -> None:
    dockerfile = repository / "compose" / "images" / f"{name}.Dockerfile"
    bases = [words[0] for instruction, words in instructions(dockerfile) if instruction == "FROM"]
    assert len(bases) == 1
    assert PINNED_BASE.match(bases[0])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copied_paths_exist(name: str, repository: Path) -> None:
    paths = copied_paths(repository / "compose" / "images" / f"{name}.Dockerfile")
    assert paths
    assert [path for path in paths if not (repository / path).exists()] == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copied_paths_pass_the_ignore_file(name: str, repository: Path) -> None:
    images = repository / "compose" / "images"
    ignore = (images / f"{name}.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = copied_paths(images / f"{name}.Dockerfile")
    assert [path for path in copied if not {path, *map(str, Path(path).parents)} & allowed] == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_containers_do_not_run_as_root(name: str, repository: Path) -> None:
    steps = instructions(repository / "compose" / "images" / f"{name}.Dockerfile")
    users = [words[0] for instruction, words in steps if instruction == "USER"]
    assert users
    assert users[-1].split(":")[0] not in {"root", "0"}


def test_every_build_names_a_dockerfile_that_exists(
    compose_file: dict[str, Any],
    repository: Path,
) -> None:
    builds = [it["build"] for it in compose_file["services"].values() if "build" in it]
    assert builds
    for build in builds:
        context = (repository / "compose" / build["context"]).resolve()
        assert context == repository.resolve()
        assert (context / build["dockerfile"]).is_file()


def test_every_package_of_ours_is_in_our_image(repository: Path) -> None:
    copied = copied_paths(repository / "compose" / "images" / "moveline.Dockerfile")
    assert {*FIRST_PARTY, "model_repo"} <= set(copied)


def test_triton_image_has_what_its_models_import(repository: Path) -> None:
    dockerfile = repository / "compose" / "images" / "triton.Dockerfile"
    reached = reached_imports(repository, python_models(repository))
    ours = {name for name in reached if name in FIRST_PARTY}
    assert ours <= set(copied_paths(dockerfile))
    # Distributions are spelled with hyphens where modules have underscores.
    distributions = {name.replace("_", "-") for name in reached - ours}
    assert distributions <= installed_in_triton(dockerfile)


def test_imports_are_followed_through_our_modules(tmp_path: Path) -> None:
    model = tmp_path / "model_repo" / "m" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text(
        "import json\nimport triton_python_backend_utils\nfrom scoring import assemble\n",
    )
    package = tmp_path / "scoring"
    package.mkdir()
    (package / "__init__.py").write_text("import msgspec\n")
    (package / "assemble.py").write_text("def f() -> None:\n    import torch.nn\n")
    (package / "client.py").write_text("import tritonclient\n")
    assert reached_imports(tmp_path, python_models(tmp_path)) == {"scoring", "msgspec", "torch"}
