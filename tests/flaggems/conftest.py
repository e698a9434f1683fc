"""FlagGems' operators behind the backend: interpreted from its sources, or the installed package on a GPU."""

import pytest

from flash_attn import backends
from flash_attn.backends import flaggems
from tests.support import calls
from tests.support.gems_standin import forget


@pytest.fixture
def interpreted(request, monkeypatch):
    """FlagGems' sources in the interpreter; the parameter is the number of keys of a dense program."""
    calls.skip_unless_interpreting()
    from tests.support import interpreted_gems

    package = interpreted_gems.load(getattr(request, "param", 32))
    monkeypatch.setattr(flaggems, "_package", lambda: (package, None))
    monkeypatch.setattr(flaggems, "DENSE_DEVICES", ("cpu",))
    forget()
    with backends.use("flaggems"):
        yield package
    forget()


@pytest.fixture
def installed():
    """The package itself, on a GPU."""
    flaggems._package.cache_clear()
    package, reason = flaggems._package()
    if reason is not None:
        pytest.skip(reason)
    forget()
    with backends.use("flaggems"):
        yield package
    forget()
