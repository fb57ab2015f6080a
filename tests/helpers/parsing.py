"""The problems that parsing reports."""

import pytest

from utils.runtime.errors import UserError


def problems_of(parse, *flags) -> list[str]:
    """The problems of a command line; `parse` is the fixture."""
    with pytest.raises(UserError) as error:
        parse(*flags)
    return [str(problem) for problem in error.value.problems]
