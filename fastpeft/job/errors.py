"""The one error that the command line prints as a single line."""

from __future__ import annotations

import importlib.util


class JobError(ValueError):
    """A job that cannot start (code 2: bad input) or had to stop (code 1). The message is all that a user
    needs to see."""

    def __init__(self, message: str, *, code: int = 2):
        super().__init__(message)
        self.code = code


def said_by(verb: str, e: JobError) -> str:
    """The message in `verb`'s name: what is shared with `fastpeft finetune` says that one's."""
    return f"{verb}: {str(e).removeprefix('finetune: ').removeprefix(f'{verb}: ')}"


class Finished(JobError):
    """Nothing is left to resume: no failure, so code 0."""

    def __init__(self, message: str):
        super().__init__(message, code=0)


def require(what: str, *modules: str) -> None:
    """Raise JobError with the install command if a library that `what` needs is not installed; imports none of them."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise JobError(f"finetune: {what} needs {', '.join(missing)}; run `pip install 'fastpeft[hf]'`.")
