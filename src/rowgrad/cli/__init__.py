"""The `rowgrad` command."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for unusable input, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        arguments: what follows the command's name; by default those of the process.
    """
    try:
        from rowgrad.cli.app import run  # what it imports comes with the extra `app`
    except ModuleNotFoundError as error:
        sys.stderr.write(f"rowgrad: the command needs {error.name}; install rowgrad[app]\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return run(arguments)
