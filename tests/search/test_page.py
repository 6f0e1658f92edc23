"""search.app: what is drawn becomes a training-like picture; the page in a real headless Chromium, where there is one."""

import os
import re
import shutil
import socket
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_search import build, clouds, root, run  # noqa: F401

for package in ("gradio", "lancedb"):
    if find_spec(package) is None:
        pytest.skip("the page needs the packages of requirements-search.txt", allow_module_level=True)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
from search import app  # noqa: E402
from search.index import identity  # noqa: E402
from search.model import Model  # noqa: E402
from utils.errors import UserError  # noqa: E402

CHROMIUM = shutil.which("chromium")


@pytest.mark.parametrize("ground", [0, 255])
def test_a_drawing_is_cut_out_scaled_and_set_on_the_ground_of_training(ground):
    ink = np.zeros((320, 320), np.uint8)
    ink[100:180, 30:50] = 255
    picture = np.asarray(app.drawn_picture(ink, ground, 0.8))
    assert picture.shape == (100, 100) and set(np.unique(picture)) == {0, 255}
    rows, columns = np.nonzero(picture != ground)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 89, 40, 59)


@pytest.fixture(scope="module")
def page(run, root, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("page")
    page = app.Page(build(run, folder / "index", clouds(root)), Model(str(run), torch.device("cpu")), folder)
    return app.make_app(page), page


def test_a_bad_file_an_empty_pad_and_a_foreign_path_are_refused(page, root, tmp_path):  # noqa: F811
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(app.gr.Error, match="bad.png is no query"):
        page[1].find(str(tmp_path / "bad.png"), "plain")
    for sketch in (None, {"layers": []}, {"layers": [np.zeros((5, 5, 4), np.uint8)]}):
        with pytest.raises(app.gr.Error, match="draw something first"):
            page[1].find_drawing(sketch, "plain")
    chosen = lambda path: page[1].view([{"path": str(path)}], type("Event", (), {"index": 0}))
    assert chosen("/etc/passwd") is None and chosen(root / ".." / "secret.npy") is None
    item = next((root / "test" / "point_cloud").iterdir())
    assert chosen(item).endswith(f"{identity(str(item))}.glb")


def test_a_port_in_use_is_one_message(page):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="give another with --port"):
        app.launch(page[0], taken.getsockname()[1], prevent_thread_lock=True, quiet=True)


@pytest.mark.skipif(CHROMIUM is None or find_spec("playwright") is None, reason="needs playwright and Chromium")
def test_upload_draw_result_view_and_bad_file_in_a_browser(page, root, tmp_path):  # noqa: F811
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "bad.png").write_text("no picture")
    port, picture = 7861, next((root / "test" / "gray_imgs").iterdir())
    app.launch(page[0], port, prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
            tab = browser.new_page()
            tab.set_default_timeout(120_000)
            expect.set_options(timeout=120_000)
            outside = []
            tab.on("request", lambda request: re.match(r"https?://(?!127\.0\.0\.1)", request.url) and outside.append(request.url))
            tab.goto(f"http://127.0.0.1:{port}")
            tab.get_by_role("button", name="Find what is drawn").click()
            expect(tab.get_by_text("draw something first")).to_be_visible()
            tab.get_by_label("Brush").click()
            box = tab.locator("canvas").first.bounding_box()
            tab.mouse.move(box["x"] + 100, box["y"] + 80)
            tab.mouse.down()
            tab.mouse.move(box["x"] + 220, box["y"] + 80, steps=8)
            tab.mouse.move(box["x"] + 150, box["y"] + 240, steps=8)
            tab.mouse.up()
            tab.get_by_role("button", name="Find what is drawn").click()
            expect(tab.get_by_text(re.compile(r"^1\. -?[01]\.\d{3}$")).first).to_be_visible()
            tab.locator(".thumbnail-item").first.click()
            expect(tab.locator("canvas").last).to_be_visible()
            tab.get_by_role("tab", name="File").click()
            panel = tab.get_by_role("tabpanel").filter(has_text="A picture or a shape")
            for file, text in ((tmp_path / "bad.png", "bad.png is no query"), (picture, page[1].find(str(picture), "plain")[0])):
                panel.locator("input[type=file]").set_input_files(str(file))
                expect(panel.get_by_text(file.stem[:8]).first).to_be_visible()  # stem and suffix are two elements
                tab.get_by_role("button", name="Find what is like it").click()
                expect(tab.get_by_text(text).first).to_be_visible()
                panel.get_by_label("Clear").click()
            browser.close()
            assert outside == []
    finally:
        page[0].close()
