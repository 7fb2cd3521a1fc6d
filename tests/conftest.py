"""What several test files share: the testbed, trained once per cache, and random models built on the spot."""

import pytest


@pytest.fixture(scope="session")
def testbed():
    """The three trained models and their text; the first session on a machine trains them, which takes minutes."""
    from chassis.testbed import build

    return build()
