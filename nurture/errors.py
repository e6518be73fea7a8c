"""The one exception a user sees.

Anything a user can cause (a missing file, a malformed row, an unknown key, a full disk) is raised as
`NurtureError` with one clear message: what is wrong, where (file, line, key), and what to do about it.
The command line prints the message without a traceback and exits with `exit_code`. A bug in nurture itself
is any other exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NurtureError(Exception):
    """A mistake the user can mend. The message names the place and the remedy."""

    exit_code = 1


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the choice nearest to `word`, or an empty string if none is near."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
