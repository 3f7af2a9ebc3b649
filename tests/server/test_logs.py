import io
import json
import logging

import pytest
from vllm_server import logs

log = logging.getLogger("vllm_server.test")
pytestmark = pytest.mark.usefixtures("restored_process")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("level", "shown"),
    [("trace", 5), ("debug", 4), ("info", 3), ("warn", 2), ("error", 1)],
)
def test_a_level_shows_its_own_lines_and_more_severe_ones(level, shown):
    logs.setup(level, stream=(stream := io.StringIO()))
    for number in logs.LEVELS.values():
        log.log(number, "x")
    assert len(lines(stream)) == shown


def test_libraries_are_quiet_unless_details_are_asked_for():
    logs.setup("info", stream=(stream := io.StringIO()))
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("trouble")
    assert len(lines(stream)) == 1
    logs.setup("debug", stream=(stream := io.StringIO()))
    logging.getLogger("some.library").debug("chatter")
    assert len(lines(stream)) == 1


def test_uvicorn_speaks_through_our_handler():
    logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())
    logs.setup("info", stream=(stream := io.StringIO()))
    logging.getLogger("uvicorn.error").error("broken")
    assert "ERROR uvicorn.error: broken" in stream.getvalue()


def test_every_line_names_its_request():
    logs.setup("info", stream=(stream := io.StringIO()))
    token = logs.request_id.set("req-7")
    log.info("hello")
    logs.request_id.reset(token)
    log.info("bye")
    assert lines(stream)[0].endswith("INFO  vllm_server.test: hello [req-7]")
    assert lines(stream)[1].endswith("bye")


def test_json_lines_are_objects_with_the_same_facts():
    logs.setup("info", "json", (stream := io.StringIO()))
    token = logs.request_id.set("req-7")
    log.warning("a %s\nb", "\x1b[31m")
    logs.request_id.reset(token)
    line = json.loads(stream.getvalue())
    assert line["level"] == "warn" and line["request_id"] == "req-7"
    assert line["message"] == r"a \x1b[31m\nb"
    assert line["time"].endswith("Z")


def test_a_message_cannot_forge_a_second_line():
    logs.setup("info", stream=(stream := io.StringIO()))
    log.info("%s", "x\n12:00:00 ERROR forged")
    assert len(lines(stream)) == 1


def test_colour_is_for_terminals_whose_user_did_not_object(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    logs.setup("info", stream=(stream := Terminal()))
    log.info("x")
    assert "\x1b[32m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    logs.setup("info", stream=(stream := Terminal()))
    log.info("x")
    assert "\x1b" not in stream.getvalue()


def test_an_exception_is_one_line_with_its_place_and_a_traceback_only_on_request():
    for level, expected in (("info", 1), ("debug", 5)):
        logs.setup(level, stream=(stream := io.StringIO()))
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
        assert len(lines(stream)) >= expected
        assert ("Traceback" in stream.getvalue()) == (level == "debug")
        assert "ValueError: bad" in stream.getvalue()


def test_a_storm_of_one_kind_is_cut_and_counted_and_others_pass():
    now = [0.0]
    keep = logs.RepeatFilter(burst=3, clock=lambda: now[0]).filter

    def record(text, level=logging.WARNING, *args):
        return logging.LogRecord("a", level, "", 1, text, args, None)

    assert [keep(record("x %d", logging.WARNING, i)) for i in range(5)] == [True] * 3 + [False] * 2
    assert keep(record("y"))
    assert all(keep(record("x %d", logging.INFO, i)) for i in range(9))
    now[0] = 61.0
    late = record("x %d", logging.WARNING, 6)
    assert keep(late)
    assert "2 more like this" in logs.TextFormatter(False).format(late)


def test_ten_thousand_equal_errors_are_few_lines():
    logs.setup("info", stream=(stream := io.StringIO()))
    for i in range(10_000):
        log.error("no space for %d", i)
    assert len(lines(stream)) <= 200


def test_a_log_that_cannot_be_written_does_not_raise():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("No space left on device")

    logs.setup("info", stream=Full())
    log.error("x")
