"""Progress: a bar in a terminal, one plain line a minute in a file."""

import io
import logging

import pytest

from ldm import bars
from ldm.bars import DETAIL, Screen, above, bar, duration, log_to_screen, short


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Time:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    """The clock of all bars; no thread draws in between."""
    turned = Time()
    monkeypatch.setattr(bars, "clock", turned)
    monkeypatch.setattr(bars, "_last_line", turned.now)
    monkeypatch.setattr(bars._Pulse, "start_once", lambda: None)
    return turned


@pytest.fixture
def file() -> io.StringIO:
    """A file."""
    return io.StringIO()


def test_a_line_a_minute(time, file):
    """An hour of thousands of updates and two bars, one within the other."""
    with bar(file=file, total=3600, desc="rendering", unit="images") as outer:
        for second in range(3600):
            time.now += 1
            with bar(file=file, total=10, desc="a part") as inner:
                inner.update(10)
            outer.set_postfix_str(f"second {second}")
            outer.update()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()
    assert len(lines) == 60 and all(line.startswith("rendering: ") for line in lines)
    assert lines[29].startswith("rendering: 1,7") and "30 min left, second 17" in lines[29]


def test_what_takes_a_moment_leaves_no_line(time, file):
    for _ in range(100):
        with bar(file=file, total=3, desc="a batch") as shown:
            for _ in range(3):
                time.now += 0.9
                shown.update()
    assert file.getvalue() == ""


def test_what_comes_late_in_a_minute_is_told_after_five_seconds(time, file):
    time.now += 300
    with bar(file=file, total=10, desc="drawing swap grid, picture 2 of 3") as shown:
        for _ in range(10):
            time.now += 1
            shown.update()
            shown.refresh()
    assert file.getvalue() == "drawing swap grid, picture 2 of 3: 50 %, 5 s left\n"


def test_the_rate_is_of_the_last_minute_and_the_time_left_of_all(time, file):
    shown = bar(file=file, total=1000, desc="encoding", unit="images")
    for count in (100, 300):
        time.now += 60
        shown.update(count)
        shown.refresh()
    assert file.getvalue().splitlines() == [
        "encoding: 100 of 1,000 images, 1.67 images/s, 9 min left",
        "encoding: 400 of 1,000 images, 5.00 images/s, 3 min left",
    ]
    shown.close()


def test_the_rate_leaves_out_what_runs_in_between(time, file):
    """A validation of nine minutes; the time that is left knows it."""
    with bar(file=file, total=200, desc="epoch 0", unit="steps") as outer:
        time.now += 60
        outer.update(100)
        with bar(file=file, total=1, desc="validation"):
            time.now += 540
        outer.refresh()
    assert file.getvalue() == "epoch 0: 100 of 200 steps, 1.67 steps/s, 10 min left\n"


def test_a_resumed_count(time, file):
    with bar(file=file, total=1000, initial=900, desc="epoch 9", unit="steps") as shown:
        time.now += 60
        shown.update(50)
        shown.refresh()
    assert file.getvalue() == "epoch 9: 950 of 1,000 steps, .833 steps/s, 60 s left\n"


def test_a_terminal_gets_a_bar_that_goes_away(time, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with bar(total=4, desc="drawing swap grid, picture 2 of 3") as shown:
        time.now += 60
        shown.update(2)
        shown.refresh()
    text = stream.getvalue()
    assert "\rdrawing swap grid, picture 2 of 3  50%|" in text and "60 s left" in text
    assert "\n" not in text and text.rsplit("\r", 2)[1].strip() == "", repr(text)


def test_the_pulse_draws_what_has_no_updates(time, file):
    shown = bar(file=file, desc="scoring dci, metric 3 of 4")
    assert not shown.due(bars.PULSE[False])
    time.now += 69
    assert shown.due() and not shown.due(bars.PULSE[False])
    time.now += 2
    assert shown.due(bars.PULSE[False])
    shown.refresh()
    assert file.getvalue() == "scoring dci, metric 3 of 4: 71 s so far\n" and not shown.due()
    shown.close()


def test_nothing_without_progress_or_a_stream(time, file, monkeypatch):
    with bar(file=file, total=2, progress=False, desc="x") as shown:
        time.now += 600
        shown.update(2)
        shown.refresh()
    assert file.getvalue() == ""
    monkeypatch.setattr("sys.stderr", None)
    with bar(range(2), desc="x") as shown:
        assert list(shown) == [0, 1]


def test_messages_are_above_the_bars(time, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    logger = logging.Logger("of this test")
    logger.addHandler(Screen(stream))
    with bar(total=4, desc="drawing"):
        stream.truncate(0)
        logger.info("a message")
        logger.info("for the file", extra=DETAIL)
        with above():
            stream.write("a warning\n")
    text = stream.getvalue().replace("\0", "")
    assert "\ra message\n" in text and "\ra warning\n" in text and "for the file" not in text
    assert text.index("a message") < text.rindex("drawing"), "the bar is drawn again"


def test_a_way_of_logging_of_ones_own_stays():
    root = logging.getLogger()
    before = list(root.handlers)
    assert before, "pytest's"
    log_to_screen()
    assert root.handlers == before


def test_durations_and_numbers():
    times = {3: "3 s", 99: "99 s", 100: "2 min", 3000: "50 min", 6000: "1 h 40 min", 172800: "2 d 0 h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    numbers = {0.1234: ".123", 1: "1.00", 12.345: "12.3", 1234.5: "1,234", -0.5: "-.500", 0: "0", 2e-5: "2e-05"}
    assert {value: short(value) for value in numbers} == numbers and short(float("nan")) == "nan"
