"""The two ways a command ends badly. The CLI prints the message as one line and exits with
`exit_code`."""

__all__ = ["InputError", "LillamaError", "RunError"]


class LillamaError(Exception):
    """Message form: what is wrong, what was got, what is wanted, what to do."""

    exit_code = 1


class InputError(LillamaError, ValueError):
    """The caller's arguments, files or data cannot be used; nothing was started."""

    exit_code = 2


class RunError(LillamaError, RuntimeError):
    """The work failed after it had begun; nothing half-written is left behind."""

    exit_code = 1
