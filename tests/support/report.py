"""Figures that a test run shows without -s."""

import pytest


def report(config: pytest.Config, *lines: str) -> None:
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n")
