"""Errors that a person can act on, and the exit statuses of the command line."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75


class UserError(ValueError):
    """The user's input is wrong. The text says in one to three lines what, where, expected, fix."""


class Stopped(Exception):
    """The run was asked to stop (signal); its state is saved and the same command goes on."""


class Failed(RuntimeError):
    """The run cannot go on, though the input was right. The text says in one to three lines why and what to do."""
