"""The packages under ``examples/`` are what a third party would write: installed by pip, they pass their own tests, and
train and sample together. Nothing of them is importable here otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch

from mtdiffusion_benchmarks.stored import expanded
from tests.pages import chromium, served

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = ("mtdiffusion-depth", "mtdiffusion-audio", "mtdiffusion-tokens", "mtdiffusion-speech")
KINDS = {
    "mtdiffusion-depth": {"modality depth"},
    "mtdiffusion-audio": {
        "modality audio",
        "field audio",
        "dataset digit_tones",
        "evaluator tone_reader",
        "task spoken_digits",
    },
    "mtdiffusion-tokens": {"modality tokens"},
    "mtdiffusion-speech": {"modality logmel", "field logmel", "dataset spoken_digits"},
}
pytestmark = pytest.mark.slow


def run(site: Path, *command: str | Path, cwd: Path) -> str:
    """The output of a command that sees the installed packages and, of ours, only what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def mtdiffusion(site: Path, *arguments: str | Path, cwd: Path) -> str:
    return run(site, sys.executable, "-m", "mtdiffusion_engine.cli", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the packages, without their dependencies, which are here already."""
    folder = tmp_path_factory.mktemp("site")
    # The build backend comes from the registry unless it is here.
    options = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    packages = [EXAMPLES / name for name in PACKAGES]
    run(folder, *pip, *options, "--target", folder, *packages, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``spoken-digits.toml``, five steps of it."""
    folder = tmp_path_factory.mktemp("spoken")
    changes = ["training.steps=5", "training.batch_size=8", "backbone.channels=16", "training.log_every=1"]
    command = ["train", EXAMPLES / "spoken-digits.toml", "--out", "run", "--device", "cpu", "--set", *changes]
    mtdiffusion(site, *command, cwd=folder)
    return folder


def test_they_are_found_and_imported_by_nobody_else(site: Path) -> None:
    for module in (package.replace("-", "_") for package in PACKAGES):
        assert importlib.util.find_spec(module) is None, f"{module} is installed here, so this file proves nothing"
    lines = mtdiffusion(site, "plugins", "list", cwd=site).splitlines()
    for package, kinds in KINDS.items():
        rows = [line.split() for line in lines if package in line]
        assert {f"{group} {kind}" for group, kind, *_ in rows} == kinds
        assert all("ok" in row for row in rows)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_passes_its_own_tests(package: str, site: Path) -> None:
    tests = EXAMPLES / package / "tests"
    # From elsewhere, so that the package is imported as installed and not from its source.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests]
    out = run(site, *command, cwd=site)
    assert " passed" in out and "failed" not in out and "skipped" not in out


def test_the_experiment_trains_all_four(trained: Path) -> None:
    events = list((trained / "run").glob("**/*"))
    assert any(path.suffix == ".safetensors" or "checkpoint" in path.name for path in events)
    stored = (trained / "run" / "config.toml").read_text()
    for kind in ("image", "label", "audio", "tokens", "digit_tones", "tone_reader"):
        assert f'kind = "{kind}"' in stored


def test_any_of_them_from_any(site: Path, trained: Path) -> None:
    """From a label, then back from the files that this wrote."""
    sample = ["sample", "run", "-n", "2", "--steps", "2", "--device", "cpu"]
    mtdiffusion(site, *sample, "--observe", "label=3", "--out", "spoken", cwd=trained)
    made = {name: sorted((trained / "spoken" / name).glob("*")) for name in ("image", "audio", "tokens")}
    assert {name: [path.suffix for path in paths] for name, paths in made.items()} == {
        "image": [".png"] * 2,
        "audio": [".wav"] * 2,
        "tokens": [".txt"] * 2,
    }
    assert (trained / "spoken" / "label.csv").read_text().splitlines()[1].split(",")[1] == "3"
    given = ["--observe", f"audio={made['audio'][0]}", "--observe", f"tokens={made['tokens'][0]}"]
    mtdiffusion(site, *sample, *given, "--out", "heard", cwd=trained)
    assert len((trained / "heard" / "label.csv").read_text().splitlines()) == 3
    assert (trained / "heard" / "audio" / "0000.wav").read_bytes() == made["audio"][0].read_bytes()


def test_the_page_has_an_input_and_a_player_of_each_by_itself(site: Path, trained: Path) -> None:
    """As its controls are made and called; a browser clicks them in a test of its own."""
    code = """
import json, wave
from pathlib import Path
import gradio as gr
from mtdiffusion_engine import load_run
from mtdiffusion_engine.play.page import build_page
page = build_page(load_run("run", device="cpu"), Path("played"))
(event,) = (fn for fn in page.fns.values() if fn.api_name == "sample")
inputs = {each.elem_id: type(each).__name__ for each in event.inputs if each.elem_id}
entered = {each: getattr(each, "value", None) for each in event.inputs}
for update in event.fn(entered, gr.Request(session_hash="a session")):
    shown = {each.elem_id: value for each, value in update.items()}
lengths = []
for path in Path("played").glob("**/audio/*.wav"):
    with wave.open(str(path)) as sound:
        lengths.append(sound.getnframes() / sound.getframerate())
print(json.dumps([inputs, str(shown["shown-audio"]), str(shown["shown-tokens"]), lengths]))
"""
    inputs, audio, tokens, lengths = json.loads(run(site, sys.executable, "-c", code, cwd=trained).splitlines()[-1])
    assert inputs["sound-audio"] == "Audio" and inputs["text-tokens"] == "Textbox"
    assert audio.count("<audio controls") == len(lengths) > 0
    assert lengths == [pytest.approx(1024 / 8000)] * len(lengths)
    assert tokens.count("<p>") == len(lengths)


@pytest.mark.long
def test_the_page_shows_them_as_it_does_ours(site: Path, trained: Path, tmp_path: Path) -> None:
    """A recording of another rate and length is heard, a text is typed, and what is sampled plays."""
    time = torch.arange(44100) / 44100
    sound = (10000 * torch.sin(2 * torch.pi * 697 * time) * (time > 0.5)).round().numpy().astype("<i2")
    with wave.open(str(tmp_path / "recording.wav"), "wb") as file:
        file.setparams((1, 2, 44100, 0, "NONE", ""))
        file.writeframes(sound.tobytes())
    with chromium() as browser, served(trained / "run", {"PYTHONPATH": str(site)}) as address:
        view = browser.new_page()
        view.goto(address)
        view.click("#use-audio label:nth-child(2)")
        view.set_input_files("#card-audio input[type=file]", tmp_path / "recording.wav")
        view.wait_for_selector("#card-audio #waveform")
        view.click("#sample")
        view.wait_for_selector("text=the loudest 0.13 s are taken, at 8000 Hz")
        view.wait_for_selector("#sheet img")
        assert view.locator("#shown-audio audio").count() == 1  # given
        view.click("#use-audio label:nth-child(1)")
        view.click("#use-tokens label:nth-child(2)")
        view.fill("#text-tokens textarea", "three dark")
        view.click("#sample")
        view.wait_for_function("document.querySelectorAll('#shown-audio audio').length == 8")
        assert view.inner_text("#shown-tokens p:not(.quiet)") == "three dark"
        played = view.evaluate("""async () => {
            const audio = document.querySelector("#shown-audio audio");
            await audio.play();
            await new Promise(ended => audio.addEventListener("ended", ended));
            return audio.duration;
        }""")
        assert played == pytest.approx(1024 / 8000)


def test_they_are_evaluated_by_their_own_judges(site: Path, trained: Path) -> None:
    code = """
from mtdiffusion_engine import load_run
from mtdiffusion_engine.evaluation import complete_samples, evaluate
run = load_run("run")
few = run.settings(steps=2)
train, test = complete_samples(run.data("train")), complete_samples(run.data("test"), 8)
judges = [config.build(train) for config in run.experiment.evaluation.evaluators if config.kind == "tone_reader"]
import json
print(json.dumps(evaluate(run.model, test, judges, conditional=few, joint=few)))
"""
    metrics = json.loads(run(site, sys.executable, "-c", code, cwd=trained).splitlines()[-1])
    assert metrics["real/tone_accuracy"] == 1.0
    for key in (
        "audio|label/tone_accuracy",
        "joint/tone_agreement",
        "label|audio/accuracy",
        "tokens|image/exact_match",
    ):
        assert 0 <= metrics[key] <= 1
    assert torch.isfinite(torch.tensor(list(metrics.values()), dtype=torch.float64)).all()


def test_a_word_that_no_caption_has_is_refused_by_name(site: Path, trained: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "400", "NO_COLOR": "1"}
    command = [
        sys.executable,
        "-m",
        "mtdiffusion_engine.cli",
        "sample",
        "run",
        "--observe",
        "tokens=three darc strokes",
    ]
    done = subprocess.run(
        [*command, "--out", "x"], cwd=trained, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean 'dark'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_the_benchmark_takes_modalities_task_and_judge_that_it_does_not_know(site: Path, tmp_path: Path) -> None:
    for name in ("spoken-digits.toml", "spoken-digits.bench.toml"):
        text = (EXAMPLES / name).read_text(encoding="utf-8").replace("channels = 48", "channels = 16")
        (tmp_path / name).write_text(text.replace("training.steps=1000", "training.steps=5"), encoding="utf-8")
    mtdiffusion(site, "bench", "run", "spoken-digits.bench.toml", "--out", "out", "--only", "*/0", cwd=tmp_path)
    cells = {
        path.stem: expanded(json.loads(path.read_text(encoding="utf-8"))) for path in (tmp_path / "out/cells").iterdir()
    }
    assert {cell["status"] for cell in cells.values()} == {"ok"}, {name: cell["reason"] for name, cell in cells.items()}
    joint = cells["spoken__spoken-digits__joint__0"]
    assert {"audio|label/tone_accuracy", "tokens|image/exact_match", "joint/tone_agreement"} <= set(joint["metrics"])
    assert "label|audio/accuracy" in cells["spoken__spoken-digits__hearing__0"]["metrics"]
    mtdiffusion(site, "bench", "report", "out", cwd=tmp_path)
    assert "tone_accuracy" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def spoken_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings named as the Free Spoken Digit Dataset's: a tone of its own for each digit, twice for each split."""
    folder = tmp_path_factory.mktemp("recordings")
    time = torch.arange(4000) / 8000
    for digit in range(10):
        sound = (10000 * torch.sin(2 * torch.pi * (300 + 300 * digit) * time)).round().numpy().astype("<i2")
        for number in (0, 1, 5, 6):
            with wave.open(str(folder / f"{digit}_ann_{number}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(sound.tobytes())
    return folder


@pytest.mark.long
def test_speech_is_trained_with_pictures_and_heard_again(site: Path, spoken_digits: Path, tmp_path: Path) -> None:
    few = [f"data.root={spoken_digits}", "training.steps=3", "training.batch_size=8", "sampling.steps=2"]
    config = EXAMPLES / "speech.toml"
    mtdiffusion(site, "train", config, "--out", "run", "--device", "cpu", "--set", *few, cwd=tmp_path)
    sample = ["sample", "run", "-n", "2", "--steps", "2", "--device", "cpu"]
    mtdiffusion(site, *sample, "--observe", "label=3", "--out", "said", cwd=tmp_path)
    said = tmp_path / "said/speech/0000.wav"
    mtdiffusion(site, *sample, "--observe", f"speech={said}", "--out", "heard", cwd=tmp_path)
    assert len(list((tmp_path / "heard/image").glob("*.png"))) == 2


@pytest.mark.long
def test_the_benchmark_on_real_data_takes_speech(site: Path, spoken_digits: Path, tmp_path: Path) -> None:
    """The profile that ships, with all its cells sound; and those of speech, three steps of each."""
    code = f"""
import sys
from pathlib import Path
from attrs import evolve
from mtdiffusion_benchmarks.profile import load_profile, plan
from mtdiffusion_benchmarks.runner import Runner
from mtdiffusion_registry import Registry
registry = Registry.discover()
profile, path = load_profile("real", registry)
Runner(profile, path.parent, Path("all"), registry)._check(plan(profile))
few = ["training.steps=3", "training.batch_size=8", "sampling.steps=2", "evaluation.steps=2", "backbone.channels=8"]
judges = 'evaluation.evaluators=[{{kind="judge",epochs=1}},{{kind="judge",name="listener",input="speech",epochs=1}}]'
profile = evolve(profile, set=("data.root={spoken_digits}", judges, *few))
states = Runner(profile, path.parent, Path("out"), registry).run(plan(profile, ("speech/*",)))
assert states == {{"ok": 5}}, states
"""
    run(site, sys.executable, "-c", code, cwd=tmp_path)
    joint = tmp_path / "out/cells/speech__image+label+speech__joint__0.json"
    made = expanded(json.loads(joint.read_text(encoding="utf-8")))
    metrics = made["metrics"]
    assert {"speech|image/listener_accuracy", "joint/listener_agreement", "real/listener_accuracy"} <= set(metrics)
    for figure in made["figures"]:
        heard = {name for name, sounds in zip(figure["columns"], figure.get("sounds", []), strict=False) if sounds}
        assert heard == {name for name in figure["columns"] if name.endswith("speech")}
    mtdiffusion(site, "bench", "report", "out", cwd=tmp_path)
    assert "<audio " in (tmp_path / "out/report.html").read_text(encoding="utf-8")
