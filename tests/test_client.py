"""The engine subprocess seen from the app: answers, loads, deaths, restarts and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.client import EngineClient, LocalEngine
from runtime.core import (
    Accepted,
    Delta,
    EngineStatus,
    Finished,
    GenerationChunk,
    LoadRequest,
    Message,
    SamplingParams,
)
from runtime.engine_process import explain_exit
from runtime.errors import BusyError, EngineDiedError, PreScopeError, RequestError
from runtime.inbox import MAX_WAITING
from runtime.sequences import MAX_TOGETHER

FAKE = ("--assembly", "tests.hosted_fake")
ROOT = Path(__file__).resolve().parent.parent
PARAMS = SamplingParams()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    client = LocalEngine(tmp_path, FAKE)
    yield client
    client.close()


def until(question: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def load(engine: LocalEngine, model: str = "model") -> EngineStatus:
    engine.load(LoadRequest(model))
    until(lambda: engine.status().state in ("ready", "empty", "dead"))
    return engine.status()


def say(engine: LocalEngine, text: str) -> str:
    chunks = list(engine.generate("c", [Message("user", text)], PARAMS))
    assert isinstance(chunks[0], Accepted)
    assert isinstance(chunks[-1], Finished)
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Delta))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_keeps_the_contract_of_the_app(engine: LocalEngine) -> None:
    client: EngineClient = engine
    until(lambda: client.status().state == "empty")
    assert client.snapshot() is None


def test_it_loads_and_answers(engine: LocalEngine) -> None:
    assert load(engine).model == "model"
    assert say(engine, "one two") == "one two "
    until(lambda: engine.snapshot() is not None)


def test_the_wish_for_quantised_experts_arrives_with_the_app_s_data_folder(
    engine: LocalEngine, tmp_path: Path
) -> None:
    engine.load(LoadRequest("model", experts="int4"))
    until(lambda: engine.status().state == "ready")
    assert engine.status().remarks == ("Experts are int4.", f"Kept in {tmp_path}.")
    assert engine.status().notice == ""
    assert load(engine).remarks == ()


def test_what_an_engine_gives_up_while_it_answers_is_told(engine: LocalEngine) -> None:
    assert load(engine).remarks == ()
    assert say(engine, "tight") == "tight "
    until(lambda: engine.status().remarks == ("Memory ran out while answering.",))
    assert engine.status().state == "ready"


def test_a_generation_sent_right_after_a_load_waits_for_it(engine: LocalEngine) -> None:
    engine.load(LoadRequest("model"))
    assert say(engine, "hello") == "hello "


def test_a_request_without_a_model_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(RequestError, match="No model"):
        say(engine, "hello")


def test_a_refused_request_carries_its_words(engine: LocalEngine) -> None:
    load(engine)
    with pytest.raises(RequestError) as refused:
        say(engine, "refuse")
    assert refused.value.next_step == "Ask otherwise."


def test_an_exception_in_the_model_reaches_the_caller_and_the_engine_lives(
    engine: LocalEngine,
) -> None:
    load(engine)
    before = engine.pid
    with pytest.raises(PreScopeError, match="boom"):
        say(engine, "crash")
    assert say(engine, "fine") == "fine "
    assert engine.pid == before


def test_an_exception_on_a_card_replaces_the_process(engine: LocalEngine) -> None:
    load(engine, "card model")
    before = engine.pid
    with pytest.raises(PreScopeError, match="boom"):
        say(engine, "crash")
    until(lambda: engine.status().state == "ready" and engine.pid not in (None, before))
    assert "graphics card" in engine.status().notice
    assert say(engine, "fine") == "fine "


def test_stray_prints_do_not_reach_the_pipe(engine: LocalEngine, tmp_path: Path) -> None:
    load(engine)
    assert say(engine, "print") == "print "
    assert say(engine, "again") == "again "
    assert engine.status().restarts == 0
    assert "stray text" in (tmp_path / "logs" / "engine.log").read_text("utf-8", "replace")


def test_closing_the_iterator_stops_the_generation(engine: LocalEngine) -> None:
    load(engine)
    chunks = engine.generate("c", [Message("user", "forever")], PARAMS)
    for _ in range(5):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    *_, last = chunks
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"
    assert say(engine, "next") == "next "


def test_another_thread_may_close_the_iterator_that_one_waits_on(engine: LocalEngine) -> None:
    load(engine)
    running = engine.generate("c", [Message("user", "forever")], PARAMS)
    next(running)
    waiting = engine.generate("d", [Message("user", "never begun")], PARAMS)
    reader = threading.Thread(target=lambda: list(running), daemon=True)
    reader.start()
    running.close()  # type: ignore[attr-defined]
    reader.join(10)
    assert not reader.is_alive()
    assert isinstance(list(waiting)[-1], Finished)


def test_an_iterator_nobody_keeps_stops_its_generation(engine: LocalEngine) -> None:
    load(engine)
    next(engine.generate("c", [Message("user", "forever")], PARAMS))
    assert say(engine, "next") == "next "
    until(lambda: len(engine._requests) == 0)


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(
    engine: LocalEngine,
) -> None:
    load(engine)
    room = MAX_TOGETHER + MAX_WAITING
    running = [engine.generate(f"c{n}", [Message("user", "forever")], PARAMS) for n in range(room)]
    for one in running:
        next(one)
    with pytest.raises(BusyError):
        say(engine, "too many")
    running[3].close()  # type: ignore[attr-defined]
    assert isinstance(list(running[3])[-1], Finished)
    assert say(engine, "fits now") == "fits now "
    assert len(engine._requests) == room - 1


def test_answers_come_side_by_side_and_stopping_one_stops_only_it(engine: LocalEngine) -> None:
    load(engine)
    arrived: list[tuple[str, GenerationChunk]] = []

    def read(name: str, chunks: Iterator[GenerationChunk]) -> None:
        arrived.extend((name, chunk) for chunk in chunks)

    def deltas(name: str) -> int:
        return sum(who == name and isinstance(chunk, Delta) for who, chunk in arrived)

    answers = {
        name: engine.generate(name, [Message("user", "forever")], PARAMS) for name in ("a", "b")
    }
    threads = [threading.Thread(target=read, args=item) for item in answers.items()]
    for thread in threads:
        thread.start()
    until(lambda: deltas("a") > 20 and deltas("b") > 20)
    names = [name for name, chunk in arrived if isinstance(chunk, Delta)]
    turns = sum(left != right for left, right in zip(names, names[1:], strict=False))
    assert turns > 10, "one was answered after the other"
    answers["a"].close()  # type: ignore[attr-defined]
    threads[0].join(10)
    assert not threads[0].is_alive()
    before = deltas("b")
    until(lambda: deltas("b") > before + 20)
    answers["b"].close()  # type: ignore[attr-defined]
    threads[1].join(10)
    ends = [name for name, chunk in arrived if isinstance(chunk, Finished)]
    assert sorted(ends) == ["a", "b"]


def test_one_that_fails_beside_another_fails_alone(engine: LocalEngine) -> None:
    load(engine)
    running = engine.generate("a", [Message("user", "forever")], PARAMS)
    next(running)
    for text, words in (("crash", "boom"), ("refuse", "No")):
        with pytest.raises(PreScopeError, match=words):
            say(engine, text)
    assert isinstance(next(running), Delta)
    running.close()  # type: ignore[attr-defined]
    assert isinstance(list(running)[-1], Finished)


def test_a_load_waits_for_the_answers_under_way_and_requests_after_it_for_the_load(
    engine: LocalEngine,
) -> None:
    load(engine)
    running = [engine.generate(f"c{n}", [Message("user", "forever")], PARAMS) for n in range(2)]
    for one in running:
        next(one)
    engine.load(LoadRequest("other"))
    late: list[str] = []
    thread = threading.Thread(target=lambda: late.append(say(engine, "late")))
    thread.start()
    until(lambda: len(engine._requests) == 3)
    for one in running:
        for _ in range(20):
            assert isinstance(next(one), Delta)
        assert not late
        one.close()  # type: ignore[attr-defined]
        assert isinstance(list(one)[-1], Finished)
    thread.join(20)
    assert late == ["late "]
    assert engine.status().model == "other"


def test_prediction_is_switched_and_reset_while_answers_run(engine: LocalEngine) -> None:
    load(engine)
    running = engine.generate("a", [Message("user", "forever")], PARAMS)
    next(running)
    for on in (False, True, False):
        engine.set_prediction(on)
        until(lambda wanted=on: (s := engine.snapshot()) is not None and s.prediction == wanted)  # type: ignore[misc]
    engine.reset_predictor()
    until(lambda: (s := engine.snapshot()) is not None and s.model == "model, reset")
    running.close()  # type: ignore[attr-defined]


def test_between_answers_it_may_learn_until_there_is_nothing_more(engine: LocalEngine) -> None:
    load(engine)
    say(engine, "one")
    until(lambda: (s := engine.snapshot()) is not None and s.model == "model, rested 3")
    time.sleep(0.3)  # as long as it would take to be asked six times more
    shot = engine.snapshot()
    assert shot is not None
    assert shot.model == "model, rested 3"
    assert say(engine, "two") == "two "
    until(lambda: (s := engine.snapshot()) is not None and s.model == "model, rested 4")


@pytest.mark.parametrize("model", ["broken", "raising", "never fits"])
@pytest.mark.parametrize("first", ["model", "card model"])
def test_a_failing_load_keeps_the_previous_model(
    engine: LocalEngine, first: str, model: str
) -> None:
    load(engine, first)
    status = load(engine, model)
    assert (status.state, status.model) == ("ready", first)
    assert status.notice
    assert status.next_step
    assert say(engine, "still here") == "still here "


def test_a_model_that_does_not_fit_beside_the_old_one_takes_its_place(
    engine: LocalEngine,
) -> None:
    load(engine)
    assert load(engine, "large").model == "large"
    assert say(engine, "there") == "there "


def test_a_load_can_be_cancelled_and_the_previous_model_stays(engine: LocalEngine) -> None:
    load(engine)
    engine.load(LoadRequest("slow"))
    until(lambda: engine.status().progress.done_bytes == 1)
    assert engine.status().loading == "slow"
    engine.cancel_load()
    until(lambda: engine.status().state == "ready")
    assert engine.status() == EngineStatus("ready", "model")


def test_a_newer_load_replaces_the_one_under_way(engine: LocalEngine) -> None:
    engine.load(LoadRequest("slow"))
    until(lambda: engine.status().progress.done_bytes == 1)
    assert load(engine, "other").model == "other"


def test_a_policy_change_reaches_the_engine_and_survives_a_restart(engine: LocalEngine) -> None:
    load(engine)
    engine.set_policy("cpu-miss")
    say(engine, "x")
    until(lambda: (shot := engine.snapshot()) is not None and shot.policy == "cpu-miss")
    assert engine._answering is not None
    assert engine._answering.policy == "cpu-miss"


def test_the_engine_killed_mid_answer_is_reported_and_restarted(engine: LocalEngine) -> None:
    load(engine)
    seen: list[GenerationChunk] = []
    with pytest.raises(EngineDiedError, match="memory") as death:
        seen.extend(engine.generate("c", [Message("user", "so far kill")], PARAMS))
    assert [chunk.text for chunk in seen if isinstance(chunk, Delta)] == ["so ", "far "]
    assert "engine.log" in death.value.next_step
    assert say(engine, "back") == "back "
    status = engine.status()
    assert (status.state, status.model, status.restarts) == ("ready", "model", 1)
    assert "memory" in status.notice


def test_an_idle_engine_that_is_killed_comes_back_with_its_model(engine: LocalEngine) -> None:
    load(engine)
    before = engine.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: engine.status().restarts == 1 and engine.status().state == "ready")
    assert engine.status().model == "model"


def test_a_model_that_kills_the_engine_is_not_loaded_again(engine: LocalEngine) -> None:
    load(engine)
    engine.load(LoadRequest("fatal"))
    until(lambda: engine.status().restarts == 1 and engine.status().state == "ready")
    assert engine.status().model == "model"
    assert "while loading fatal" in engine.status().notice


def test_an_engine_that_keeps_dying_is_given_up_and_can_be_revived(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr("runtime.client_local.RESTART_DELAYS_S", (0.0, 0.0, 0.0))
    engine: LocalEngine = request.getfixturevalue("engine")
    load(engine)
    for number in range(4):
        until(lambda: engine.status().state == "ready" and engine.pid is not None)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda count=number: engine.status().restarts == count + 1)  # type: ignore[misc]
    until(lambda: engine.status().state == "dead")
    with pytest.raises(EngineDiedError):
        say(engine, "hello?")
    assert load(engine, "model").state == "ready"
    assert say(engine, "alive") == "alive "


def test_a_template_that_hangs_is_cut_off_and_named(tmp_path: Path) -> None:
    engine = LocalEngine(tmp_path, FAKE, accept_deadline_s=0.3)
    try:
        load(engine)
        with pytest.raises(EngineDiedError, match="template of model"):
            say(engine, "hang")
        assert say(engine, "fine") == "fine "
    finally:
        engine.close()


def test_a_process_that_never_greets_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.client_local.RESTART_DELAYS_S", (0.0, 0.0, 0.0))
    silent = tmp_path / "silent.py"
    silent.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sys, "executable", sys.executable)
    real = subprocess.Popen
    monkeypatch.setattr(
        "runtime.engine_process.subprocess.Popen",
        lambda command, **options: real([sys.executable, str(silent)], **options),
    )
    engine = LocalEngine(tmp_path, FAKE, hello_deadline_s=0.1)
    until(lambda: engine.status().state == "dead")
    assert "said nothing" in engine.status().notice
    engine.close()


def test_close_leaves_no_process_and_ends_waiting_generations(tmp_path: Path) -> None:
    engine = LocalEngine(tmp_path, FAKE)
    load(engine)
    pid = engine.pid
    assert pid is not None
    chunks = engine.generate("c", [Message("user", "forever")], PARAMS)
    next(chunks)
    closer = threading.Thread(target=engine.close)
    closer.start()
    with pytest.raises(EngineDiedError, match="closing"):
        list(chunks)
    closer.join(10)
    assert gone(pid)
    engine.close()
    assert threading.active_count() < 10
    with pytest.raises(EngineDiedError):
        say(engine, "hello")


@pytest.mark.parametrize("busy_with", ["idle", "load", "answer"])
def test_when_the_app_is_killed_the_engine_goes(tmp_path: Path, busy_with: str) -> None:
    script = f"""
import sys, time
from pathlib import Path
from runtime.client import LocalEngine
from runtime.core import LoadRequest, Message, SamplingParams
engine = LocalEngine(Path({str(tmp_path)!r}), {FAKE!r})
engine.load(LoadRequest("slow" if {busy_with!r} == "load" else "model"))
while engine.status().state != "ready" and engine.status().progress.done_bytes != 1:
    time.sleep(0.01)
chunks = engine.generate("c", [Message("user", "forever")], SamplingParams())
if {busy_with!r} == "answer":
    next(chunks)
print(engine.pid, flush=True)
time.sleep(60)
"""
    app = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert app.stdout is not None
    pid = int(app.stdout.readline())
    assert not gone(pid)
    app.kill()
    app.wait()
    app.stdout.close()
    until(lambda: gone(pid), 5.0)


def test_the_client_never_imports_torch() -> None:
    script = "import sys, runtime.client; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "memory"), (-11, "segmentation"), (-7, "bus error"), (3, "exit code 3"), (-99, "99")],
)
def test_exits_are_explained(code: int, words: str) -> None:
    assert words in explain_exit(code)
