"""For all tests."""

import pytest
from hypothesis import settings

# A test's time says more about what else the machine does.
settings.register_profile("towers", deadline=None)
settings.load_profile("towers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, each takes those that share what is dear to start: those of
    a folder, but modules that need a Ray of their own one by one.
    """
    for item in items:
        own = item.get_closest_marker("own_ray")
        item.add_marker(pytest.mark.xdist_group(item.path.stem if own else item.path.parent.name))
