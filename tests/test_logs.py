"""Section 4: what a log line shows, and what it never does."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from kimi_proxy import (
    METRICS,
    Metrics,
    RedactingFormatter,
    configure_logging,
    logger,
    request_id,
)

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


def line(name: str, message: str, *arguments: object, error: BaseException | None = None) -> str:
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord(name, logging.ERROR, "f", 1, message, arguments, exc_info)
    return RedactingFormatter().format(record)


def caught(secret: str) -> BaseException:
    try:
        try:
            raise ValueError(secret)
        except ValueError as error:
            raise RuntimeError(f"again {secret}") from error
    except RuntimeError as error:
        return error


def test_a_line_has_time_level_request_and_words() -> None:
    token = request_id.set("abc123")
    try:
        text = line("kimi_proxy", "hello %s", "you")
    finally:
        request_id.reset(token)
    assert text.endswith(" error [abc123] hello you") and text[:2] == "20"


def test_a_traceback_shows_places_and_classes_and_no_message() -> None:
    text = line("kimi_proxy", "failed", error=caught("sesame"))
    assert "ValueError" in text and "RuntimeError" in text and "test_logs.py" in text
    assert "sesame" not in text


def test_lines_of_other_packages_lose_their_values() -> None:
    text = line("aiohttp.server", "Error handling request from %s", "sesame", error=caught("sesame"))
    assert "Error handling request from" in text and "sesame" not in text
    assert "sesame" not in line("asyncio", "Task exception was never retrieved: %r", "sesame")


def test_what_looks_like_a_secret_is_redacted_in_our_lines_too() -> None:
    assert JWT not in line("kimi_proxy", "token %s", JWT)


@pytest.fixture
def keep_logging() -> object:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logger.level)
    yield
    root.handlers[:], root.level = before[0], before[1]
    logger.setLevel(before[2])
    logging.captureWarnings(False)


@pytest.mark.usefixtures("keep_logging")
def test_all_logging_goes_through_the_formatter(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    logging.getLogger("aiohttp.server").error("head %s", "sesame")
    logger.debug("not shown")
    logger.info("shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("sesame", UserWarning, stacklevel=1)
    text = capsys.readouterr().err
    assert "shown" in text and "not shown" not in text and "head" in text
    assert "sesame" not in text


def test_metrics_count_by_name_and_labels() -> None:
    metrics = Metrics()
    assert metrics.count("a") == 1
    assert metrics.count("a", 2) == 3
    assert metrics.count("a", step="x", kind="y") == 1
    assert metrics.counts["a"] == 3


def test_log_lines_as_json() -> None:
    formatter = RedactingFormatter("json")
    try:
        raise ValueError("secret words")
    except ValueError as error:
        record = logging.LogRecord("kimi_proxy", logging.ERROR, "", 0, 'a "quoted" line: %s', ("文",), None)
        record.exc_info = (ValueError, error, error.__traceback__)
    line = formatter.format(record)
    value = json.loads(line)
    assert (value["level"], value["message"], value["request_id"]) == ("error", 'a "quoted" line: 文', "-")
    assert value["traceback"][0] == "builtins.ValueError" and "secret" not in line and "\n" not in line


def test_every_metric_has_its_row_and_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.count("kimi_proxy_failures_total", code='a"b\\c\nd')
    metrics.observe("kimi_proxy_upstream_seconds", 0.2)
    text = metrics.render({"kimi_proxy_accounts": 5})
    assert 'kimi_proxy_failures_total{code="a\\"b\\\\c\\nd"} 1' in text
    assert 'kimi_proxy_upstream_seconds_bucket{le="0.1"} 0\n' in text
    assert 'kimi_proxy_upstream_seconds_bucket{le="0.25"} 1\n' in text
    assert "kimi_proxy_accounts 5\n" in text
    source = Path(Metrics.render.__code__.co_filename).read_text("utf-8")
    counted = set(re.findall(r'(?:count|observe)\(\s*"(kimi_proxy_\w+)"', source))
    assert counted <= METRICS.keys() and all(f"# TYPE {name} " in text for name in METRICS)


def test_a_counter_without_labels_starts_at_0_and_one_with_labels_has_no_series_before_its_first() -> None:
    metrics = Metrics()
    text = metrics.render({})
    assert "\nkimi_proxy_chunks_total 0\n" in text and "\n# TYPE kimi_proxy_failures_total counter\n" in text
    assert not re.search(r"(?m)^kimi_proxy_(failures|requests|unknown|denied_addresses)_total", text)
    metrics.count("kimi_proxy_failures_total", code="not_found")
    assert '\nkimi_proxy_failures_total{code="not_found"} 1\n' in metrics.render({})


@pytest.mark.usefixtures("keep_logging")
def test_what_another_package_repeats_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    for name in ("asyncio", "kimi_proxy"):
        for _ in range(3):
            logging.getLogger(name).error("socket.accept() out of system resource\nsocket: <sesame>")
    for _ in range(3):  # of tries that come after the server was closed
        logging.getLogger("asyncio").error("Exception in callback BaseSelectorEventLoop._start_serving(<sesame>)")
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert sum("asyncio: socket.accept() out of system resource" in line for line in lines) == 1
    assert sum("] socket.accept()" in line for line in lines) == 3 and "_start_serving" not in text


@pytest.mark.usefixtures("keep_logging")
def test_a_clients_fault_is_no_error_and_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    server = logging.getLogger("aiohttp.server")
    for error in (BadHttpMessage("sesame"), web.RequestPayloadError("sesame"), ValueError("sesame")):
        server.error("Error handling request from %s", "sesame", exc_info=error)
    malformed, *failed = capsys.readouterr().err.splitlines()
    assert malformed.endswith(" info [-] aiohttp.server: Error handling request from")
    assert [line.split()[-1] for line in failed] == ["from", "builtins.ValueError"] and " error [-] " in failed[0]


def test_a_line_for_the_journal_begins_with_its_priority() -> None:
    record = logging.LogRecord("kimi_proxy", logging.WARNING, "", 0, "words", (), None)
    assert RedactingFormatter(with_priority=True).format(record).startswith("<4>2")
    assert RedactingFormatter().format(record).startswith("2")
