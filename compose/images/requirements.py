"""Prints the pinned requirements of pyproject.toml, all of them or those named.

Run while an image is built, so that a version is written in one place only. Standard library
alone: nothing is installed yet at that moment.

    python requirements.py pyproject.toml               # everything the project depends on
    python requirements.py pyproject.toml torch numpy   # these, with the project's pins
"""

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

# A requirement's name ends where extras, a version or a marker begin.
NAME_END = re.compile(r"[\s\[<>=!~;@]")


def distribution_name(requirement: str) -> str:
    """The name in a requirement, spelled as package indexes compare it.

    >>> distribution_name("Feast[redis]==0.67.0")
    'feast'
    """
    return re.sub(r"[-_.]+", "-", NAME_END.split(requirement, maxsplit=1)[0]).lower()


def pinned_requirements(pyproject: Path, names: Sequence[str]) -> list[str]:
    """Requirements of the project, in its order.

    Args:
        pyproject: the project's file.
        names: distributions to keep; none means all.

    Raises:
        ValueError: the project does not depend on one of `names`.
    """
    with pyproject.open("rb") as file:
        requirements: list[str] = tomllib.load(file)["project"]["dependencies"]
    wanted = {distribution_name(name) for name in names}
    unknown = wanted - {distribution_name(requirement) for requirement in requirements}
    if unknown:
        message = (
            f"{', '.join(sorted(unknown))} not among the dependencies in {pyproject}; "
            "add the pin there or drop the name from the Dockerfile"
        )
        raise ValueError(message)
    return [text for text in requirements if not wanted or distribution_name(text) in wanted]


def main(arguments: list[str]) -> int:
    """Prints one requirement a line; exit status 2 and a sentence when it cannot."""
    if not arguments:
        sys.stderr.write("no pyproject.toml given; try: python requirements.py pyproject.toml\n")
        return 2
    try:
        requirements = pinned_requirements(Path(arguments[0]), arguments[1:])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.writelines(f"{requirement}\n" for requirement in requirements)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
