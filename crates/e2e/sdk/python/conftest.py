"""What all tests with the official Python SDK share. The server is named by E2B_API_URL and E2B_SANDBOX_URL."""

import json
import os
import urllib.error
import urllib.request
import uuid

import e2b
import pytest


def version():
    from importlib.metadata import version as installed

    return tuple(int(part) for part in installed("e2b").split("."))


def newer(minimum):
    """Skips a test that needs a newer SDK."""
    return pytest.mark.skipif(version() < minimum, reason=f"needs SDK {minimum}, this is {version()}")


RESULTS = {}
REFUSED = []


def pytest_runtest_logreport(report):
    """Keeps what became of each test, for the table of what is compatible."""
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else report.outcome
        RESULTS[report.nodeid.split("/")[-1]] = why


def pytest_sessionfinish():
    """Writes that table, when somebody wants it."""
    path = os.environ.get("KELVIN_E2E_TABLE")
    if not path:
        return
    dotted = ".".join(str(part) for part in version())
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# What the tests with the Python SDK {dotted} show\n\n")
        file.write("Written by the test run (`crates/e2e/sdk/python/conftest.py`); the run fails when it is another.\n\n")
        file.write("| client | what | result |\n|---|---|---|\n")
        for name, outcome in RESULTS.items():
            client, what = name.removeprefix("test_").split(".py::test_")
            file.write(f"| {client} | {what.replace('_', ' ')} | {outcome} |\n")
        file.write("\nWhat is refused, asked for as its clients do:\n\n| what | reply | why |\n|---|---|---|\n")
        for what, reply, why in REFUSED:
            file.write(f"| {what} | {reply} | {why} |\n")


@pytest.fixture
def refuses():
    """Asks for what is not there, and keeps the answer for the table."""

    def ask(what, method, path, body=None):
        request = urllib.request.Request(
            os.environ["E2B_API_URL"] + path,
            json.dumps(body).encode() if body is not None else None,
            {"X-API-KEY": os.environ["E2B_API_KEY"], "Content-Type": "application/json"},
            method=method,
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        told = json.loads(refused.value.read())
        REFUSED.append((what, f"{told['code']} `{told['error_code']}`", told["message"].split(", expected")[0]))
        return told["code"], told["error_code"]

    return ask


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
