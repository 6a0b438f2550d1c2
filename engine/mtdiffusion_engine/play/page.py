"""The page of ``mtdiffusion play``: a card for each modality, and what is sampled beside what is given.

It asks each modality how its values may be given (:attr:`mtdiffusion.Modality.input_spec`) and looks at what it writes,
so that a modality of a third party is shown as ours are.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import os
import queue
import random
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from attrs import field, frozen
from PIL import Image
from torch import Tensor

from mtdiffusion import Modality, Params
from mtdiffusion.conditioning import merge_visible
from mtdiffusion.sampler import SOLVERS
from mtdiffusion_engine.pictures import rendered, sample_sheet
from mtdiffusion_engine.play import values
from mtdiffusion_engine.play.values import HOLE, PICTURES, SOUNDS, TEXTS, Canvas, Colour, Painting
from mtdiffusion_engine.run import Run
from mtdiffusion_registry import UserError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it would ask its makers for a newer version
import gradio as gr
from starlette.middleware import Middleware

GENERATE, GIVEN, START = "generate", "given", "start from"
AS_TRAINED, TOGETHER, AS_SET = "as the run has it", "all together", "as set here"
MOST_SAMPLES, KEPT = 64, 8
"""Samples at a time, and results whose files are kept to be looked at."""
MOST_NOISE = 4.0
"""η at most: what helps a solver is below it (docs/sampling.md)."""

_PREVIEW = 0.3  # seconds between previews
_READING = 20  # seconds that an error stays
_TILES = 16  # of a preview
_FEW = 12  # choices that are shown side by side
_DRAWING = ((0, 0, 0), (255, 255, 255), (128, 128, 128), (220, 50, 40), (245, 200, 60), (50, 150, 70), (40, 100, 200))
_BLANK = (((0, 0, 0), "Black"), ((255, 255, 255), "White"))
_TOGETHER = ", everything generated together"
_NOTHING = '<p class="quiet">Its samples will be here.</p>'
_CSS = """
.gradio-container > main {max-width: 1180px; margin: 0 auto; padding: 16px}
.html-container {padding: 0 !important}
#sample, #stop {align-self: center; height: 48px}
.uses label {padding: 5px 9px}
.uses .wrap {gap: 6px}
.card {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 14px 16px}
.tiles {display: flex; flex-wrap: wrap; gap: 6px}
.tiles figure {margin: 0; max-width: 100%}
.tiles img {display: block; max-width: 100%; image-rendering: pixelated; border-radius: 3px}
.tiles a, .sheet a {display: block; padding: 0 !important}
.sheet img {margin: 0; max-width: 100%; border: 1px solid var(--border-color-primary)}
.tiles :is(audio, .player) {display: block; width: 220px; max-width: 100%; height: 36px; margin-top: 4px}
.texts {flex-direction: column; align-items: flex-start}
.texts p {margin: 0; padding: 6px 10px; border-radius: 6px; background: var(--background-fill-secondary)}
.legend {display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px; max-height: 96px; overflow-y: auto}
.legend span {white-space: nowrap}
.legend i {display: inline-block; width: 12px; height: 12px; margin-right: 5px; border: 1px solid #888}
.quiet, .quiet p {color: var(--body-text-color-subdued); font-size: 14px; margin: 0}
@media (max-width: 480px) {
  .gradio-container > main {padding: 10px}
  .card {padding: 10px}
  #status {min-height: 45px}  /* two lines */
  .uses label {padding: 4px 7px; font-size: 13px}
  /* The canvas leaves a tenth of the height below it, but of a narrow page less beside it than the tools take. */
  .card .toolbar-wrap {top: auto; bottom: 1px; left: 1px; right: auto; width: auto; flex-direction: row}
  .card .toolbar-wrap .half-container {flex-direction: row; padding: 0 4px; border-top: 0}
}
#status {min-height: 33px}  /* as high as the progress, so that nothing moves when it begins and ends */
.bar {height: 6px; margin-top: 4px; border-radius: 3px; background: var(--border-color-primary)}
.bar div {height: 6px; border-radius: 3px; background: var(--color-accent)}
"""
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    b"connect-src 'self' data: blob:; worker-src 'self' blob:"
)

Component = Any
"""Of gradio, which has no types that are checked here."""


@frozen(eq=False)
class Card:
    """What the page has of one modality.

    Attributes:
        use: whether it is generated, given, or started from.
        entered: what it may be given by, the first that is not empty counts: a "canvas", a "choice", a "text", a
            "sound", a "file" or a "line".
        noise: how much noise it starts with; None where nothing can be started from.
        ahead: how far it runs ahead of the slowest; None where all have one clock.
        shown: what was sampled.
        canvas: of pictures and classes.
        written: the suffix of the files that it writes.
    """

    name: str
    modality: Modality
    use: Component
    entered: Mapping[str, Component]
    noise: Component | None
    ahead: Component | None
    shown: Component
    canvas: Canvas | None
    written: str

    @property
    def inputs(self) -> set[Component]:
        """All that a person sets of it."""
        return {self.use, *self.entered.values(), *(each for each in (self.noise, self.ahead) if each is not None)}


@frozen(eq=False)
class Request:
    """What is asked of the model, as :meth:`Run.sample` takes it.

    Attributes:
        notes: what was done to something that was given.
        said: those given that are one word or text, as it was entered.
    """

    count: int
    seed: int
    settings: Mapping[str, Any]
    observed: MutableMapping[str, Tensor] = field(factory=dict)
    visible: MutableMapping[str, Tensor] = field(factory=dict)
    strength: MutableMapping[str, float] = field(factory=dict)
    notes: MutableMapping[str, str] = field(factory=dict)
    said: MutableMapping[str, str] = field(factory=dict)


class Stopped(Exception):
    """Raised in the sampler when the person has seen enough."""


class Sampling:
    """One sampling in a thread of its own, that tells what it is at.

    Args:
        run: whose model it is.
        request: what is asked.
    """

    def __init__(self, run: Run, request: Request) -> None:
        self.samples: dict[str, Tensor] = {}
        self._run, self._request = run, request
        self._told: queue.SimpleQueue[tuple[int, int, dict[str, Tensor]] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Steps done, of how many, and now and then what is expected of some samples, by name; {} otherwise.

        Raises:
            UserError: if the request cannot be met.
            Stopped: if it was told to stop.
        """
        self._thread.start()
        try:
            while (told := self._told.get()) is not None:
                yield told
        finally:  # nobody may be listening any more
            self._stop.set()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it after this step."""
        self._stop.set()

    def _sample(self) -> None:
        request, last = self._request, 0.0

        def tell(done: int, of: int, params: Mapping[str, Params]) -> None:
            nonlocal last
            if self._stop.is_set():
                raise Stopped
            estimates: dict[str, Tensor] = {}
            if time.monotonic() - last >= _PREVIEW:
                estimates = {name: self._estimate(name, each) for name, each in params.items()}
                last = time.monotonic()
            self._told.put((done, of, estimates))

        try:
            out = self._run.sample(
                request.count,
                observed=request.observed,
                visible=request.visible,
                strength=request.strength,
                seed=request.seed,
                on_step=tell,
                **request.settings,
            )
            self.samples = {name: x.cpu() for name, x in out.items()}
        except Exception as error:  # it is raised again where somebody listens
            self._error = error
        self._told.put(None)

    def _estimate(self, name: str, params: Params) -> Tensor:
        """What is expected of the first samples of a modality ``[k, ...]``, with what is given of them."""
        first = {key: value[:_TILES] for key, value in params.items()}
        modality = self._run.modality(name)
        x = modality.decoder.mode(first).cpu()
        given = self._request.observed.get(name)
        if given is None or (name in self._request.strength and name not in self._request.visible):
            return x
        given = given.cpu().expand(x.shape)
        visible = self._request.visible.get(name)
        if visible is None:
            return given
        visible = visible.expand(len(x), *visible.shape)
        return modality.mend(merge_visible(given, x, visible), visible)


def serve(run: Run, host: str, port: int | None, ready: Callable[[str], None]) -> None:
    """Show the page of a run until Ctrl-C.

    Args:
        host: the address to listen on.
        port: None: 7860, or the next that is free.
        ready: is told the page's address.

    Raises:
        UserError: if it cannot listen there.
    """
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "entered")
        # It asks itself whether it answers, which no proxy is to be asked for.
        os.environ["no_proxy"] = ",".join([*filter(None, [os.environ.get("no_proxy")]), "localhost", "127.0.0.1", host])
        page = build_page(run, Path(folder) / "results")
        try:
            _, address, _ = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **look(folder))
        except OSError as error:
            where = f"--host {host}" if port is None else f"--host {host} --port {port}"
            raise UserError(f"{where}: cannot listen there (in use, or no address of this machine): {error}") from None
        try:
            ready(address)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def look(folder: str | Path) -> dict[str, Any]:
    """How the page is launched, beside where: nothing is loaded from elsewhere, nothing shared.

    Args:
        folder: whose files may be asked for.
    """
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {
        "theme": theme,
        "css": _CSS,
        "share": False,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "allowed_paths": [str(Path(folder).resolve())],
        "app_kwargs": {"middleware": [Middleware(_OwnOnly)]},
    }


class _OwnOnly:
    """Tells browsers to load nothing from anywhere else, whatever a page asks for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def build_page(run: Run, folder: Path) -> gr.Blocks:
    """The page of a run.

    Args:
        folder: where the files of results are put, of the newest few.
    """
    name = run.path.absolute().name
    sampling = run.settings()
    shared = run.model.layout.shared_clock
    with gr.Blocks(title=f"{name} · mtdiffusion", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"# {html.escape(name)}\nOne model of {_listed(run.model.names)}. Choose what is given, then press "
            "**Sample**: the rest is generated."
        )
        with gr.Row():
            sample = gr.Button("Sample", variant="primary", min_width=120, elem_id="sample")
            stop = gr.Button("Stop", min_width=80, elem_id="stop")
            count = gr.Slider(1, MOST_SAMPLES, 8, step=1, label="Samples", min_width=200, elem_id="count")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=130, elem_id="seed")
            fresh = gr.Checkbox(True, label="New seed each time", min_width=190, elem_id="fresh")
        with gr.Accordion("How it is sampled", open=False):
            with gr.Row():
                most = run.model.process.steps
                steps = gr.Slider(1, most, min(sampling.steps, most), step=1, label="Steps", elem_id="steps")
                solver = gr.Dropdown(list(SOLVERS), value=sampling.solver, label="Solver", elem_id="solver")
                eta = gr.Slider(
                    0,
                    max(MOST_NOISE, sampling.noise),
                    sampling.noise,
                    step=0.05,
                    label="η: noise of a step",
                    visible=sampling.solver != "ancestral",
                    elem_id="eta",
                )
                guidance = gr.Slider(
                    0,
                    max(10.0, sampling.guidance),
                    sampling.guidance,
                    step=0.1,
                    label="Guidance on what is given (1: none)",
                    elem_id="guidance",
                )
            draw = gr.Checkbox(sampling.draw, label="In the end, draw at random instead of taking what is likeliest")
            path = gr.Radio(
                [AS_TRAINED, TOGETHER, AS_SET],
                value=AS_TRAINED,
                label="Path: which modalities are denoised ahead of others, and by which share of it",
                visible=not shared,
                elem_id="path",
            )
            with gr.Row(visible=False) as offsets:
                ahead = {
                    each: None
                    if shared
                    else gr.Slider(
                        0, 0.95, 0, step=0.05, label=f"{each} ahead by", min_width=160, elem_id=f"ahead-{each}"
                    )
                    for each in run.model.names
                }
        status = gr.HTML("", elem_id="status")
        cards = [_card(run, each, ahead[each]) for each in run.model.names]
        with gr.Column(elem_classes="card", visible=False) as whole:
            gr.Markdown("### All at a glance")
            sheet = gr.HTML("", elem_classes="sheet", elem_id="sheet")
            archive = gr.DownloadButton("Download all files", size="sm", elem_id="archive")

        solver.change(
            lambda chosen: gr.update(visible=chosen != "ancestral", value=run.settings(solver=chosen).noise),
            solver,
            eta,
            show_progress="hidden",
            api_visibility="private",
        )
        path.change(
            lambda chosen: gr.update(visible=chosen == AS_SET),
            path,
            offsets,
            show_progress="hidden",
            api_visibility="private",
        )
        controls = {"count": count, "seed": seed, "fresh": fresh, "steps": steps, "solver": solver, "eta": eta}
        controls |= {"guidance": guidance, "draw": draw, "path": path}
        running: dict[str, Sampling] = {}
        results: deque[Path] = deque()

        def on_sample(entered: dict[Component, Any], session: gr.Request) -> Iterator[dict[Component, Any]]:
            key = str(session.session_hash)
            control = {name: entered[component] for name, component in controls.items()}
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    request = read_request(run, cards, control, entered, Path(scratch))
                for noted, text in request.notes.items():
                    gr.Info(f"{noted}: {text}")
                running[key] = Sampling(run, request)
                begun = _progress(0, request.settings["steps"])
                yield {seed: request.seed, status: begun, whole: gr.update(visible=False)}
                began: float | None = None  # after the first step, which is slower: memory and kernels are found then
                for done, of, estimates in running[key]:
                    now = time.monotonic()
                    began = now if began is None else began
                    left = (now - began) / (done - 1) * (of - done) if done > 1 else None
                    tiles = {c.shown: _tiles(c, estimates[c.name], request) for c in cards if c.name in estimates}
                    yield {status: _progress(done, of, left), **tiles}
                out = _result_folder(folder, results)
                yield _result(run, cards, request, running[key].samples, out) | {
                    status: _done(request),
                    whole: gr.update(visible=True),
                    sheet: _sheet(out / "files" / "samples.png"),
                    archive: out / f"{name}-samples.zip",
                }
            except Stopped:
                yield {status: '<p class="quiet">Stopped.</p>'}
            except UserError as error:
                yield {status: ""}
                raise _refusal(str(error)) from None
            except Exception:
                logging.getLogger(__name__).exception("sampling failed")
                raise _refusal("This is a fault of the program or of a plugin; the terminal says where.") from None
            finally:
                running.pop(key, None)

        def on_stop(session: gr.Request) -> None:
            if (asked := running.get(str(session.session_hash))) is not None:
                asked.stop()

        inputs = {*controls.values()}.union(*(card.inputs for card in cards))
        outputs = [seed, status, whole, sheet, archive, *(card.shown for card in cards)]
        sample.click(on_sample, inputs, outputs, show_progress="hidden", api_name="sample")
        stop.click(on_stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
    return page


def read_request(
    run: Run, cards: Sequence[Card], control: Mapping[str, Any], entered: Mapping[Component, Any], folder: Path
) -> Request:
    """What the page's controls and cards ask for.

    Args:
        control: values of the controls, by name.
        entered: values of all components.
        folder: for files that are made on the way.

    Raises:
        UserError: for what is missing or does not fit; the modality is named.
    """
    if not 1 <= control["count"] <= MOST_SAMPLES:
        raise UserError(f"Samples: expected 1 to {MOST_SAMPLES}, found {control['count']}")
    if control["seed"] is None or control["seed"] < 0:
        raise UserError("Seed: expected a whole number from 0, found none")
    settings = {key: control[key] for key in ("steps", "solver", "guidance", "draw")}
    settings["eta"] = control["eta"] if control["solver"] != "ancestral" else None
    if control["path"] == TOGETHER:
        settings["path"] = "shared"
    elif control["path"] == AS_SET:
        settings["path"] = {card.name: entered[card.ahead] for card in cards if card.ahead and entered[card.ahead]}
    seed = random.randrange(2**31) if control["fresh"] else int(control["seed"])
    request = Request(int(control["count"]), seed, settings)
    for card in cards:
        if entered[card.use] == GENERATE:
            continue
        try:
            _read_card(card, entered, request, folder)
        except UserError as error:
            said = str(error)  # which may name it itself
            raise UserError(said if said.startswith(f"{card.name}:") else f"{card.name}: {said}") from None
        if entered[card.use] == START and card.noise is not None:
            request.strength[card.name] = entered[card.noise]
    return request


def _read_card(card: Card, entered: Mapping[Component, Any], request: Request, folder: Path) -> None:
    """Add what is given of a modality to a request."""
    found = {how: entered[each] for how, each in card.entered.items() if entered[each] not in (None, "")}
    if not found:
        raise UserError(f'nothing is given yet. Give something, or choose "{GENERATE}"')
    how, value = next(iter(found.items()))
    name, modality = card.name, card.modality
    if how == "canvas":
        assert card.canvas is not None
        painting = Painting.of(value["background"], value["layers"], card.canvas.size)
        x = values.read_painting(modality, painting, card.canvas, folder)
        visible = values.visible_places(modality, painting) if modality.encoder.spatial else None
        if visible is not None:
            request.visible[name] = visible
    elif how == "choice":
        x, request.said[name] = modality.parse(value), value
    elif how == "text":
        x, request.said[name] = values.read_text(modality, value, folder), value
    elif how == "sound":
        x, note = values.read_sound(modality, Path(value), folder)
        if note:
            request.notes[name] = note
    elif how == "file":
        x = values.read_file(modality, Path(value))
    else:
        x, request.said[name] = values.read_line(modality, value), value
    request.observed[name] = x


def _card(run: Run, name: str, ahead: Component | None) -> Card:
    """Lay out the card of a modality."""
    modality = run.modality(name)
    uses = [GENERATE, GIVEN] if run.model.layout.shared_clock else [GENERATE, GIVEN, START]
    with gr.Column(elem_classes="card", elem_id=f"card-{name}"), gr.Row():
        with gr.Column(scale=2, min_width=280):
            gr.Markdown(f"### {html.escape(name)}")
            use = gr.Radio(
                uses, value=GENERATE, show_label=False, container=False, elem_classes="uses", elem_id=f"use-{name}"
            )
            noise = None
            with gr.Column(visible=False) as giving:
                if START in uses:
                    noise = gr.Slider(
                        0.02,
                        1,
                        0.5,
                        step=0.02,
                        label="Its clock: near 0 keeps it, 1 forgets it",
                        visible=False,
                        elem_id=f"noise-{name}",
                    )
                entered, canvas = _ways_to_give(modality, name)
        with gr.Column(scale=3, min_width=280):
            shown = gr.HTML(_NOTHING, elem_id=f"shown-{name}")
            if modality.legend and modality.input_spec.form != "classes":
                gr.HTML(_legend(modality.legend))

    def on_use(chosen: str) -> dict[Component, Any]:
        updates = {giving: gr.update(visible=chosen != GENERATE)}
        return updates if noise is None else updates | {noise: gr.update(visible=chosen == START)}

    use.change(
        on_use, use, [giving] if noise is None else [giving, noise], show_progress="hidden", api_visibility="private"
    )
    return Card(name, modality, use, entered, noise, ahead, shown, canvas, values.written_suffix(modality))


def _ways_to_give(modality: Modality, name: str) -> tuple[dict[str, Component], Canvas | None]:
    """What a modality may be given by, as its input_spec says or as it writes, and its canvas if there is one."""
    spec, written = modality.input_spec, values.written_suffix(modality)
    if spec.form in ("picture", "classes"):
        return _canvas(modality, name)
    if spec.form == "choice":
        choose = gr.Radio if len(spec.names) <= _FEW else gr.Dropdown
        return {"choice": choose(list(spec.names), value=spec.names[0], label="Choose", elem_id=f"choice-{name}")}, None
    if written in TEXTS:
        return {"text": gr.Textbox(label="Type a text", lines=2, elem_id=f"text-{name}")}, None
    if written in SOUNDS:
        sound = gr.Audio(
            sources=["upload", "microphone"],
            type="filepath",
            label="A sound",
            buttons=["download"],
            elem_id=f"sound-{name}",
        )
        return {"sound": sound}, None
    file = gr.File(label=f"A file, such as {written}", height=120, elem_id=f"file-{name}")
    taken = f"Or a value, as mtdiffusion sample --observe {name}=VALUE takes it"
    return {"file": file, "line": gr.Textbox(label=taken, elem_id=f"line-{name}")}, None


def _canvas(modality: Modality, name: str) -> tuple[dict[str, Component], Canvas]:
    """A canvas to draw or paint on, and what fills it."""
    spec, canvas = modality.input_spec, Canvas.of(modality)
    brushes = list(spec.colours) if spec.form == "classes" else list(_DRAWING)
    palette = [*zip(spec.names, spec.colours, strict=True)] if spec.form == "classes" else []
    hint = "Draw, or open a file."
    if spec.form == "classes":
        hint = "Paint each class in its colour, or open a file."
    if modality.encoder.spatial:
        brushes.append(HOLE)
        palette.append(("hole", HOLE))
        hint += " What is painted pink is a hole: it is filled in."
    gr.HTML(f'<p class="quiet">{hint}</p>{_legend(palette)}')
    radius = max(round(0.7 * canvas.scale), min(canvas.size) // 40)
    editor = gr.ImageEditor(
        _filled(canvas, brushes[0] if spec.form == "classes" else (0, 0, 0)),
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=[],
        transforms=[],
        layers=gr.LayerOptions(disabled=True),
        brush=gr.Brush(
            default_size=radius,
            colors=[_hex(colour) for colour in brushes],
            default_color=_hex(brushes[1 % len(brushes)]),
            color_mode="fixed" if spec.form == "classes" else "defaults",
        ),
        eraser=gr.Eraser(default_size=radius),
        canvas_size=canvas.size,
        fixed_canvas=True,
        show_label=False,
        elem_id=f"canvas-{name}",
    )

    def on_open(path: str) -> dict[str, Any]:
        try:
            return _editor_value(values.opened(modality, Path(path), canvas))
        except UserError as error:
            raise _refusal(f"{name}: {error}") from None

    with gr.Row():
        opened = gr.UploadButton("Open a file", size="sm", min_width=80, elem_id=f"open-{name}")
        opened.upload(on_open, opened, editor, show_progress="hidden", api_visibility="private")
        for colour, label in _BLANK if spec.form == "picture" else [(brushes[0], "Clear")]:
            blank = gr.Button(label, size="sm", min_width=80)
            blank.click(
                lambda colour=colour: _filled(canvas, colour),
                None,
                editor,
                show_progress="hidden",
                api_visibility="private",
            )
    return {"canvas": editor}, canvas


def _filled(canvas: Canvas, colour: Colour) -> dict[str, Any]:
    return _editor_value(Image.new("RGB", canvas.size, colour))


def _editor_value(picture: Image.Image) -> dict[str, Any]:
    return {"background": picture, "layers": [], "composite": picture}


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _refusal(message: str) -> gr.Error:
    """What the page says where a request cannot be met."""
    return gr.Error(html.escape(message), duration=_READING, print_exception=False)


def _result(
    run: Run, cards: Sequence[Card], request: Request, samples: Mapping[str, Tensor], out: Path
) -> dict[Component, Any]:
    """Write the samples, each into a file, and all at a glance; what the cards then show."""
    name = run.path.absolute().name
    files = out / "files"
    tiles = {}
    for card in cards:
        (files / card.name).mkdir(parents=True)
        written = [card.modality.write(x, files / card.name, f"{i:04d}") for i, x in enumerate(samples[card.name])]
        tiles[card.shown] = _tiles(card, samples[card.name], request, written)
    sheet = sample_sheet(
        run.model,
        samples,
        f"Samples of {name}",
        observed=request.observed,
        visible=request.visible,
        strength=request.strength,
        values=request.said,
    )
    sheet.save(files / "samples.png")
    shutil.make_archive(str(out / f"{name}-samples"), "zip", files)
    return tiles


def _tiles(card: Card, x: Tensor, request: Request, files: Sequence[Path] = ()) -> str:
    """HTML of samples ``[k, ...]``: pictures, players of sounds, texts, and links to their files.

    What is given for all is shown once.
    """
    name = card.name
    given = name in request.observed and name not in request.visible and name not in request.strength
    if given:
        x, files = x[:1], files[:1]
    head = '<p class="quiet">given</p>' if given else ""
    if card.written in TEXTS:
        texts = (html.escape(values.written_text(card.modality, each)) or "<em>(empty)</em>" for each in x)
        return f'{head}<div class="tiles texts">{"".join(f"<p>{text}</p>" for text in texts)}</div>'
    with torch.no_grad():
        pictures = rendered(card.modality, name, x).tiles()
    figures = []
    for i, picture in enumerate(pictures):
        assert picture is not None
        figures.append(_figure(card, f"{name} {i + 1}", picture, files[i] if files else None))
    return f'{head}<div class="tiles">{"".join(figures)}</div>'


def _figure(card: Card, said: str, picture: Image.Image, file: Path | None) -> str:
    """One sample; without a file, what is expected of it.

    Args:
        said: what a person who does not see the picture is told.
    """
    drawn = io.BytesIO()
    picture.save(drawn, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    image = f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="{html.escape(said)}">'
    if file is None:
        player = '<div class="player"></div>' if card.written in SOUNDS else ""
        return f"<figure>{image}{player}</figure>"
    address = _address(file)
    if card.written in SOUNDS:
        return f'<figure>{image}<audio controls preload="metadata" src="{address}"></audio></figure>'
    opens = 'target="_blank"' if card.written in PICTURES else f'download="{file.name}" title="Download {file.name}"'
    return f'<figure><a href="{address}" {opens}>{image}</a></figure>'


def _sheet(file: Path) -> str:
    return f'<a href="{_address(file)}" target="_blank"><img src="{_address(file)}" alt="All samples at a glance"></a>'


def _address(file: Path) -> str:
    """Of a file, for the page."""
    return f"gradio_api/file={quote(str(file))}"


def _legend(palette: Sequence[tuple[str, Colour]]) -> str:
    swatches = (
        f'<span><i style="background:{_hex(colour)}"></i>{html.escape(label)}</span>' for label, colour in palette
    )
    return f'<div class="legend">{"".join(swatches)}</div>'


def _progress(done: int, of: int, left: float | None = None) -> str:
    """How far it is, and how many seconds are left, once there is a step to go by and a second to wait."""
    minutes, seconds = divmod(round(left or 0), 60)
    told = f", {minutes}:{seconds:02} left" if minutes or seconds else ""
    bar = f'<div class="bar"><div style="width:{100 * done / of:.0f}%"></div></div>'
    return f'<p class="quiet">step {done} of {of}{told}</p>{bar}'


def _done(request: Request) -> str:
    number = "1 sample" if request.count == 1 else f"{request.count} samples"
    named = {name: f"{name} {request.said.get(name, '')}".strip() for name in request.observed}
    holes = {name: " with holes" if name in request.visible else "" for name in named}
    given = [named[name] + holes[name] for name in named if name not in request.strength]
    started = [f"{named[name]}{holes[name]} at clock {share:g}" for name, share in request.strength.items()]
    told = f", from {_listed(given)}" if given else ""
    told += f", started from {_listed(started)}" if started else ""
    return f'<p class="quiet">{number} with seed {request.seed}{html.escape(told or _TOGETHER)}.</p>'


def _listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _result_folder(root: Path, results: deque[Path]) -> Path:
    """An empty folder for a result; the oldest is removed when there are many."""
    root.mkdir(parents=True, exist_ok=True)
    if len(results) >= KEPT:
        shutil.rmtree(results.popleft(), ignore_errors=True)
    results.append(Path(tempfile.mkdtemp(dir=root)))
    return results[-1]
