"""The page of ``mtdiffusion play``: what is entered becomes what the modality reads, and it is sampled and shown."""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion import InputSpec, LatentSpec, Modality
from mtdiffusion.interfaces import FeatureSpec
from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.play import values
from mtdiffusion_engine.play.values import HOLE, Canvas, Painting
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import structure
from tests.pages import chromium, served

pytest.importorskip("gradio")

ROOT = Path(__file__).parents[2]


def modality(kind: str, **keys: Any) -> Modality:
    """One of ours, in a latent of 8 × 8."""
    registry = Registry.discover()
    config = structure(registry, keys, registry.config_class("modality", kind))
    return config.build(LatentSpec(config.latent_channels(8, 8), 8, 8), FeatureSpec(64, 8, 8, 16)).eval()


def strokes(size: tuple[int, int], *boxes: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> Image.Image:
    """A layer with rectangles of colours, clear elsewhere."""
    layer = Image.new("RGBA", size)
    for box, colour in boxes:
        layer.paste((*colour, 255), box)
    return layer


# --- what is entered ------------------------------------------------------------------------------------------------


def test_a_drawing_becomes_the_picture_place_by_place(tmp_path: Path) -> None:
    image = modality("image", size=8, channels=1)
    canvas = Canvas.of(image)
    assert (canvas.height, canvas.width, canvas.scale) == (8, 8, 40)
    layer = strokes(canvas.size, ((40, 80, 80, 120), (255, 255, 255)))
    painting = Painting.of(Image.new("RGB", canvas.size), [layer], canvas.size)
    x = values.read_painting(image, painting, canvas, tmp_path)
    expected = torch.full((1, 8, 8), -1.0)
    expected[0, 2, 1] = 1.0
    assert torch.equal(x, expected)
    assert values.visible_places(image, painting) is None


def test_what_is_painted_pink_is_a_hole_and_keeps_what_is_below(tmp_path: Path) -> None:
    image = modality("image", size=8, channels=1)
    canvas = Canvas.of(image)
    layer = strokes(canvas.size, ((0, 0, 160, 320), HOLE))
    painting = Painting.of(Image.new("RGB", canvas.size, (255, 255, 255)), [layer], canvas.size)
    assert bool((values.read_painting(image, painting, canvas, tmp_path) == 1).all())
    visible = values.visible_places(image, painting)
    assert visible is not None
    assert torch.equal(visible, torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1))


def test_a_painted_place_has_the_class_of_most_of_its_pixels(tmp_path: Path) -> None:
    mask = modality("mask", size=8, classes=4)
    canvas, spec = Canvas.of(mask), mask.input_spec
    assert spec.form == "classes" and len(spec.colours) == 4
    soft = tuple(c - 9 if c > 9 else c + 9 for c in spec.colours[3])  # as the edge of a stroke is
    layer = strokes(canvas.size, ((0, 0, 40, 40), spec.colours[2]), ((40, 0, 70, 40), soft))
    painting = Painting.of(Image.new("RGB", canvas.size, spec.colours[0]), [layer], canvas.size)
    expected = torch.zeros(8, 8, dtype=torch.int64)
    expected[0, 0], expected[0, 1] = 2, 3
    assert torch.equal(values.read_painting(mask, painting, canvas, tmp_path), expected)


def test_a_file_of_a_mask_is_painted_as_it_is(tmp_path: Path) -> None:
    """Through its modality, which knows what its indices mean."""
    mask = modality("mask", size=8, classes=4)
    canvas = Canvas.of(mask)
    x = torch.arange(64).reshape(8, 8) % 4
    background = values.opened(mask, mask.write(x, tmp_path, "mask"), canvas)
    painting = Painting.of(background, [], canvas.size)
    assert torch.equal(values.read_painting(mask, painting, canvas, tmp_path), x)


def test_a_file_of_a_picture_is_scaled_and_cropped_as_observe_has_it(tmp_path: Path) -> None:
    image = modality("image", size=8, channels=3)
    canvas = Canvas.of(image)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 32)).save(tmp_path / "wide.png")
    background = values.opened(image, tmp_path / "wide.png", canvas)
    x = values.read_painting(image, Painting.of(background, [], canvas.size), canvas, tmp_path)
    assert torch.allclose(x, image.parse(str(tmp_path / "wide.png")), atol=0.01)


def test_a_file_that_cannot_be_read_is_called_by_its_name_alone(tmp_path: Path) -> None:
    image = modality("image", size=8, channels=1)
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(UserError, match=r"^notes\.png: cannot be read as a picture"):
        values.opened(image, tmp_path / "notes.png", Canvas.of(image))


def test_a_typed_text_is_a_text_even_where_it_looks_like_a_path(tmp_path: Path) -> None:
    text = modality("text", length=12)
    (tmp_path / "secret.txt").write_text("open sesame")
    x = values.read_text(text, "secret.txt", tmp_path / ".")
    assert text.text(x) == "secret.txt"
    with pytest.raises(UserError, match=r"^text: expected at most 12 bytes, found 16"):
        values.read_text(text, "twelve are enough"[:16], tmp_path)


def test_a_line_is_no_path_of_this_machine(tmp_path: Path) -> None:
    clip = modality("clip", dim=4)
    (tmp_path / "x.json").write_text("[1, 0, 0, 0]")
    assert torch.equal(values.read_file(clip, tmp_path / "x.json"), torch.tensor([1.0, 0, 0, 0]))
    with pytest.raises(UserError, match="upload the file instead"):
        values.read_line(clip, str(tmp_path / "x.json"))


def test_sounds_of_any_sample_format_are_alike() -> None:
    tone = np.sin(np.arange(100) / 5)
    forms = [tone, (tone * 32767).astype(np.int16), (tone * 2147483647).astype(np.int32)]
    forms.append((tone * 127 + 128).round().astype(np.uint8))
    for samples in forms:
        assert np.allclose(values.to_mono(np.stack([samples, samples], 1)), tone, atol=0.02)  # of 8 bits


def test_a_sound_is_resampled_without_aliases_and_cut_to_its_loudest_part() -> None:
    time = np.arange(44100) / 44100
    sound = np.where((time > 0.6) & (time < 0.8), np.sin(2 * np.pi * 440 * time), 0.01)
    sound += 0.5 * np.sin(2 * np.pi * 15000 * time)  # more than 8 kHz can hold
    part = values.loudest_part(values.resampled(sound, 44100, 8000), 1024)
    assert part.shape == (1024,)
    spectrum = np.abs(np.fft.rfft(part * np.hanning(1024)))
    assert abs(np.argmax(spectrum) * 8000 / 1024 - 440) < 8
    assert spectrum[150:].max() < 0.02 * spectrum.max()  # above 1.2 kHz: nothing folded down
    assert np.array_equal(values.loudest_part(np.ones(3), 5), [1, 1, 1, 0, 0])


def test_by_default_a_modality_is_given_by_a_file_or_a_line() -> None:
    assert modality("clip", dim=4).input_spec == InputSpec("file")
    assert modality("text", length=4).input_spec == InputSpec("file")
    assert modality("label", classes=2, names=["cat", "dog"]).input_spec == InputSpec("choice", ("cat", "dog"))
    assert modality("image", size=8).input_spec == InputSpec("picture")


# --- the page, called as gradio calls it ----------------------------------------------------------------------------


class Page:
    """A page whose controls are called by their ids."""

    def __init__(self, run: Path, folder: Path) -> None:
        from mtdiffusion_engine.play.page import build_page

        self.run = load_run(run, device="cpu")
        self.blocks = build_page(self.run, folder)
        (self.event,) = (fn for fn in self.blocks.fns.values() if fn.api_name == "sample")
        self.controls = {each.elem_id: each for each in self.event.inputs if each.elem_id}

    def sample(self, **given: Any) -> list[dict[str, Any]]:
        """What the page shows, update after update, with some controls changed."""
        import gradio as gr

        entered = {each: getattr(each, "value", None) for each in self.event.inputs}
        changed = {name.replace("_", "-"): value for name, value in given.items()}
        assert changed.keys() <= self.controls.keys()
        entered |= {self.controls[name]: value for name, value in changed.items()}
        updates = self.event.fn(entered, gr.Request(session_hash="a session"))
        return [{each.elem_id: value for each, value in update.items()} for update in updates]


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(tiny_run, tmp_path_factory.mktemp("results"))


def drawn(colour: tuple[int, int, int], *layers: Image.Image) -> dict[str, Any]:
    return {"background": Image.new("RGB", (320, 320), colour), "layers": list(layers), "composite": None}


def test_there_is_a_way_to_give_each_modality(page: Page) -> None:
    for name in ("use-image", "canvas-image", "use-mask", "canvas-mask", "use-label", "choice-label"):
        assert name in page.controls
    assert page.controls["choice-label"].choices[3] == ("3", "3")


def test_samples_appear_while_they_are_sampled_and_are_kept_as_files(page: Page) -> None:
    updates = page.sample(count=3, steps=4)
    previews = [each for each in updates[:-1] if "shown-image" in each]
    assert previews and all(each["shown-image"].count("<img") == 3 for each in previews)
    assert "step 0 of 4" in updates[0]["status"]
    assert "step 3 of 4" in "".join(each["status"] for each in updates)
    last = updates[-1]
    for name in ("image", "mask", "label"):
        assert last[f"shown-{name}"].count("<img") == 3
    with zipfile.ZipFile(last["archive"]) as archive:
        files = archive.namelist()
        assert {"image/0002.png", "mask/0000.png", "label/0001.json"} <= set(files)
        with Image.open(archive.open("samples.png")) as sheet:
            assert sheet.width > 200


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_the_samples_are_those_of_the_command_line(page: Page, tiny_run: Path, tmp_path: Path, solver: str) -> None:
    sample = ["sample", str(tiny_run), "-n", "2", "--observe", "label=3", "--seed", "5", "--steps", "4"]
    sample += ["--path", "image=0.3", "--guidance", "2", "--solver", solver, "--eta", "0.5"]
    assert main([*sample, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    last = page.sample(
        count=2,
        seed=5,
        fresh=False,
        steps=4,
        guidance=2,
        solver=solver,
        eta=0.5,
        path="as set here",
        ahead_image=0.3,
        use_label="given",
        choice_label="3",
    )[-1]
    with zipfile.ZipFile(last["archive"]) as archive:
        for name in ("image/0001.png", "mask/0001.png"):  # of labels the command line makes one table
            assert archive.read(name) == (tmp_path / "out" / name).read_bytes()
    assert "label 3" in last["status"]


def test_as_much_noise_as_the_documents_advise_can_be_asked_for(page: Page) -> None:
    text = "".join((ROOT / name).read_text() for name in ("docs/sampling.md", "docs/plugins.md", "docs/results.md"))
    advised = [float(value) for value in re.findall(r"(?:--eta |\beta ?= ?)(\d+(?:\.\d+)?)", text)]
    assert len(advised) > 2 and max(advised) > 1
    eta = page.controls["eta"]
    for value in advised:
        assert eta.minimum <= eta.preprocess(value) == value <= eta.maximum


def test_texts_are_shown_as_texts_from_the_first_preview_on(tmp_path: Path) -> None:
    from mtdiffusion_engine.play.page import Card, Request, _tiles

    text = modality("text", length=12)
    card = Card("text", text, None, {}, None, None, None, None, ".txt")
    x = torch.stack([text.parse("a < b"), text.parse("c")])
    preview = _tiles(card, x, Request(2, 0, {}))
    files = [text.write(each, tmp_path, str(i)) for i, each in enumerate(x)]
    assert preview == _tiles(card, x, Request(2, 0, {}), files)
    assert "<p>a &lt; b</p><p>c</p>" in preview and "<img" not in preview


def test_the_time_left_is_told_once_there_is_a_step_to_go_by(page: Page) -> None:
    step = page.run.model.backbone.register_forward_hook(lambda *_: time.sleep(0.4))
    try:
        said = [each["status"] for each in page.sample(count=1, steps=8) if "step" in each.get("status", "")]
    finally:
        step.remove()
    assert "left" not in said[0] and "left" not in said[1]
    left = [int(found[1]) for each in said if (found := re.search(r", 0:(\d\d) left<", each))]
    assert left == sorted(left, reverse=True) and 1 <= left[-1] < left[0] <= 6


def test_a_new_seed_is_drawn_unless_it_is_kept(page: Page) -> None:
    seeds = [page.sample(count=1, steps=1, seed=7, fresh=fresh)[0]["seed"] for fresh in (True, True, False)]
    assert seeds[0] != seeds[1]
    assert seeds[2] == 7


def test_a_hole_is_filled_in_and_the_rest_is_kept(page: Page) -> None:
    hole = strokes((320, 320), ((0, 0, 320, 160), HOLE))
    last = page.sample(count=2, use_image="given", canvas_image=drawn((255, 255, 255), hole))[-1]
    with zipfile.ZipFile(last["archive"]) as archive, archive.open("image/0001.png") as file:
        pixels = np.array(Image.open(file))
    assert (pixels[4:] == 255).all()
    assert (pixels[:4] < 250).any()
    assert "image with holes" in last["status"]


def test_what_is_given_is_shown_once_and_what_is_started_from_is_sampled(page: Page) -> None:
    canvas = drawn((255, 255, 255))
    given = page.sample(count=3, use_image="given", canvas_image=canvas)[-1]["shown-image"]
    assert given.count("<img") == 1 and "given" in given
    started = page.sample(count=3, use_image="start from", canvas_image=canvas, noise_image=0.3)[-1]
    assert started["shown-image"].count("<img") == 3
    with zipfile.ZipFile(started["archive"]) as archive, archive.open("image/0001.png") as file:
        assert (np.array(Image.open(file)) != 255).any()
    assert ", started from image at clock 0.3." in started["status"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_image": "given", "canvas_image": None}, "image: nothing is given yet"),
        ({"count": 0}, "Samples: expected 1 to 64, found 0"),
        ({"seed": None, "fresh": False}, "Seed: expected a whole number"),
        ({"solver": "ddim", "eta": -1}, "eta"),
        ({"guidance": -1}, "guidance"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(page: Page, given: dict[str, Any], message: str) -> None:
    import gradio as gr

    with pytest.raises(gr.Error, match=message) as error:
        page.sample(**given)
    assert "fault" not in error.value.message


def test_stopping_ends_it_after_a_step_and_keeps_what_was_seen(page: Page) -> None:
    import gradio as gr

    entered = {each: getattr(each, "value", None) for each in page.event.inputs}
    entered[page.controls["steps"]] = 20
    (stop,) = (fn for fn in page.blocks.fns.values() if fn.fn is not None and fn.fn.__name__ == "on_stop")
    session = gr.Request(session_hash="stops")
    said = []
    for update in page.event.fn(entered, session):
        said += [value for each, value in update.items() if each.elem_id == "status"]
        stop.fn(session)
    assert "Stopped" in said[-1]
    assert not any("step 19" in each for each in said)


def test_old_results_are_removed(page: Page) -> None:
    from mtdiffusion_engine.play.page import KEPT

    archives = [Path(page.sample(count=1, steps=1)[-1]["archive"]) for _ in range(KEPT + 1)]
    assert not archives[0].exists()
    assert all(path.exists() for path in archives[1:])


def test_one_clock_leaves_out_what_takes_several(tiny_config: Path, tmp_path: Path) -> None:
    train = ["train", str(tiny_config), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*train, "--set", "latent.layout=shared", "training.steps=1"]) == 0
    page = Page(tmp_path / "run", tmp_path / "results")
    assert page.controls["path"].visible is False
    assert [value for _, value in page.controls["use-image"].choices] == ["generate", "given"]
    assert not any(name.startswith(("noise-", "ahead-")) for name in page.controls)
    assert page.sample(count=2, use_label="given", choice_label="4")[-1]["shown-image"].count("<img") == 2


def test_nothing_is_sent_to_its_makers(page: Page) -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert page.blocks.analytics_enabled is False


def test_without_gradio_it_says_what_to_install(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mtdiffusion_engine.play.page", raising=False)
    assert main(["play", str(tiny_run)]) == 2
    assert "pip install 'mtdiffusion[play]'" in capsys.readouterr().err


def test_a_port_in_use_is_said(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["play", str(tiny_run), "--device", "cpu", "--port", port]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_a_page_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


# --- the page in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(browser: Any, tiny_run: Path) -> Iterator[str]:
    with served(tiny_run) as address:
        yield address


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_shows_samples_and_loads_nothing_from_elsewhere(browser: Any, address: str, width: int) -> None:
    view = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    response = view.goto(address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    view.click("#use-label label:nth-child(2)")
    view.click("#choice-label label:nth-child(4)")
    view.click("#sample")
    view.wait_for_selector("#sheet img")
    assert view.locator("#shown-image img").count() == 8
    assert view.locator("#shown-mask img").count() == 8
    assert view.locator("#shown-label img").count() == 1  # given
    assert "label 3" in view.inner_text("#status")
    assert view.evaluate("document.documentElement.scrollWidth") == width
    # Every picture is there, the sheet's file among them.
    assert view.evaluate("[...document.querySelectorAll('.tiles img, #sheet img')].every(i => i.naturalWidth > 0)")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    view.close()


@pytest.mark.long
def test_a_file_is_opened_a_hole_is_painted_and_it_is_filled(browser: Any, address: str, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    view = browser.new_page(viewport={"width": 1280, "height": 1600})
    view.goto(address)
    view.click("#use-image label:nth-child(2)")
    view.wait_for_selector("#canvas-image canvas")
    with view.expect_response(lambda response: "queue/data" in response.url):
        view.set_input_files('#card-image input[data-testid="Open a file-upload-button"]', tmp_path / "white.png")
    view.wait_for_timeout(1000)  # the picture that comes in closes the palette
    view.click('#canvas-image button[aria-label="Color"]')
    view.click('#canvas-image button[style*="rgb(255, 0, 255)"]')
    view.wait_for_timeout(1000)
    box = view.locator("#canvas-image canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    view.mouse.click(1200, 80)  # closes the palette
    view.mouse.move(x - 60, y)
    view.mouse.down()
    view.mouse.move(x + 60, y, steps=8)
    view.mouse.up()
    view.wait_for_timeout(300)
    view.click("#sample")
    view.wait_for_selector("#sheet img")
    assert "image with holes" in view.inner_text("#status")
    with view.expect_download() as download:
        view.click("#archive")
    with zipfile.ZipFile(download.value.path()) as archive, archive.open("image/0000.png") as file:
        pixels = np.array(Image.open(file))
    assert (pixels[0] == 255).all() and (pixels[7] == 255).all()
    assert (pixels[3:5, 3:5] < 255).all()
    view.close()


@pytest.mark.long
def test_an_error_is_a_sentence_on_the_page(browser: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    view = browser.new_page()
    view.goto(address)
    view.click("#use-image label:nth-child(2)")
    view.set_input_files('#card-image input[data-testid="Open a file-upload-button"]', tmp_path / "notes.png")
    view.wait_for_selector("text=image: notes.png: cannot be read as a picture")
    view.close()


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390, 330])
def test_the_tools_cover_nothing_of_the_picture(browser: Any, address: str, width: int) -> None:
    """What is below the tools is white margin: the canvas, black here, ends beside them."""
    view = browser.new_page(viewport={"width": width, "height": 1200})
    view.goto(address)
    view.click("#use-image label:nth-child(2)")
    view.wait_for_selector("#canvas-image canvas")
    view.wait_for_timeout(1500)
    tools = view.locator("#canvas-image .toolbar-wrap").bounding_box()
    whole = view.locator("#canvas-image").bounding_box()
    view.add_style_tag(content="#canvas-image .toolbar-wrap, #canvas-image .top-panel {visibility: hidden}")
    drawn = Image.open(io.BytesIO(view.locator("#canvas-image").screenshot())).convert("L")
    dark = Image.eval(drawn, lambda level: 255 * (level < 60)).getbbox()
    assert dark is not None and dark[2] - dark[0] > 150
    x, y = tools["x"] - whole["x"], tools["y"] - whole["y"]
    assert x >= 0 and y >= 0 and x + tools["width"] <= whole["width"] and y + tools["height"] <= whole["height"]
    beside = x + tools["width"] <= dark[0] + 1 or x >= dark[2] - 1
    assert beside or y + tools["height"] <= dark[1] + 1 or y >= dark[3] - 1
    view.close()
