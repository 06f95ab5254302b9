"""The attacks of the threat model, against the real mounted page, and against stock Gradio.

Each attack is a function that reports whether it got through. All carry a valid cookie where one
exists, so that no control hides behind another.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from app.server import bind_loopback
from tests.web_targets import EVIL, Target, our_page, quiet_environment

MULTIPART = "multipart/form-data; boundary=B"
UPLOAD = (
    b"--B\r\nContent-Disposition: form-data; name=files; filename=a.txt\r\n\r\nowned\r\n--B--\r\n"
)


@pytest.fixture(scope="module")
def quiet_gradio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    with quiet_environment(folder):
        yield folder


@pytest.fixture(scope="module")
def ours(quiet_gradio: Path) -> Iterator[Target]:
    with our_page(quiet_gradio) as target:
        yield target


@pytest.fixture(scope="module")
def stock(quiet_gradio: Path) -> Iterator[Target]:
    """What a Gradio app gets without us: a private chat function, an upload, defaults."""
    import gradio as gr

    async def mounted() -> FastAPI:
        with gr.Blocks(analytics_enabled=False) as blocks:
            box = gr.Textbox()
            box.submit(lambda text: f"private answer to {text}", box, box, api_name="chat")
            gr.File()
        app = FastAPI()
        gr.mount_gradio_app(app, blocks, path="/", server_name="127.0.0.1")
        return app

    app = asyncio.run(mounted())
    bound = bind_loopback(0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield Target(bound.getsockname()[1], app)
    server.should_exit = True
    thread.join()
    bound.close()


def rebound_name_reads_the_app(target: Target) -> bool:
    """A page at evil.example, rebound to 127.0.0.1, reads our answer as its own."""
    host = f"evil.example:{target.port}"
    origin = f"Origin: http://{host}"
    reply = target.ask_signed_in("GET", "/config", origin, host=host)
    return reply.status == 200 and b"components" in reply.start


def rebound_name_calls_a_function(target: Target) -> bool:
    host = f"evil.example:{target.port}"
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/call/chat",
        f"Origin: http://{host}",
        "Content-Type: application/json",
        host=host,
        body=b'{"data": ["hello"]}',
    )
    return reply.status == 200 and b"event_id" in reply.start


def foreign_page_uploads_a_file(target: Target) -> bool:
    """A form post needs no permission of the browser; the file lands on the disk."""
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/upload",
        f"Origin: {EVIL}",
        "Sec-Fetch-Site: cross-site",
        f"Content-Type: {MULTIPART}",
        body=UPLOAD,
    )
    return reply.status == 200


def page_without_origin_uploads_a_file(target: Target) -> bool:
    reply = target.ask_signed_in(
        "POST", "/gradio_api/upload", f"Content-Type: {MULTIPART}", body=UPLOAD
    )
    return reply.status == 200


def sandboxed_frame_uploads_a_file(target: Target) -> bool:
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/upload",
        "Origin: null",
        f"Content-Type: {MULTIPART}",
        body=UPLOAD,
    )
    return reply.status == 200


def foreign_page_is_framed(target: Target) -> bool:
    reply = target.ask_signed_in("GET", "/")
    policy = reply.headers.get("content-security-policy", "")
    return "frame-ancestors 'none'" not in policy


def stranger_opens_the_page(target: Target) -> bool:
    """Another program or person on this computer guesses the port."""
    return target.ask("GET", "/").status == 200


def page_loads_from_anywhere(target: Target) -> bool:
    """An image in a model's answer would carry the chat away in its address."""
    policy = target.ask_signed_in("GET", "/").headers.get("content-security-policy", "")
    return "img-src 'self' data: blob:" not in policy


ON_STOCK = [
    rebound_name_reads_the_app,
    rebound_name_calls_a_function,
    foreign_page_uploads_a_file,
    page_without_origin_uploads_a_file,
    sandboxed_frame_uploads_a_file,
    foreign_page_is_framed,
    stranger_opens_the_page,
    page_loads_from_anywhere,
]
Attack = Callable[[Target], bool]


@pytest.mark.parametrize("attack", ON_STOCK)
def test_the_attack_works_on_stock_gradio(stock: Target, attack: Attack) -> None:
    assert attack(stock)


@pytest.mark.parametrize("attack", ON_STOCK)
def test_the_attack_fails_on_prescope(ours: Target, attack: Attack) -> None:
    assert not attack(ours)
