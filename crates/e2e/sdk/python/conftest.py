"""What all tests with the official Python SDK share. The server is named by E2B_API_URL and E2B_SANDBOX_URL."""

import uuid

import e2b
import pytest



def version():
    from importlib.metadata import version as installed

    return tuple(int(part) for part in installed("e2b").split(".")[:2])


def newer(minimum):
    """Skips a test that needs a newer SDK."""
    return pytest.mark.skipif(version() < minimum, reason=f"needs SDK {minimum}, this is {version()}")


@pytest.fixture
def tag():
    """A metadata value that nobody else has."""
    return uuid.uuid4().hex


@pytest.fixture
def make(tag):
    """Makes sandboxes that end with the test."""
    made = []

    def create(**options):
        options.setdefault("timeout", 120)
        options.setdefault("metadata", {}).setdefault("tag", tag)
        sandbox = e2b.Sandbox.create("base", **options)
        made.append(sandbox)
        return sandbox

    yield create
    for sandbox in made:
        sandbox.kill()


@pytest.fixture
def sandbox(make):
    return make()
