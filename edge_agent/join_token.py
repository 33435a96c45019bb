"""The join token that this device enrolls with: where it is read, and how a user comes by one."""

from pathlib import Path

from ecavg.common.errors import UsageError
from ecavg.common.files import read_text


def read_token(file: Path | None) -> str:
    """Return the join token in a file, beside which the file may have other words.

    Raises:
        UsageError: there is no file, or it has no join token or several of them.
    """
    if file is None:
        raise UsageError("give the join token with --token, as the cloud-server printed it")
    words = read_text(file, "join token file").split()
    tokens = {word for word in words if word.startswith("ecavg1.")}
    if len(tokens) != 1:
        raise UsageError(
            f"join token file {file} has {len(tokens) or 'no'} join tokens: write one there, ecavg1.…,"
            " as the cloud-server printed it"
        )
    return tokens.pop()


def how_to_enroll(server: str, state_dir: Path) -> str:
    """Return the command by which this device enrolls."""
    return (
        f"run `edge-agent enroll --server {server} --state-dir {state_dir} --token TOKEN`,"
        " with a token of `cloud-server token create`"
    )
