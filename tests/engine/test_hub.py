"""Exported runs: what is in them, that they serve as the run does, and what is said when they cannot."""

from __future__ import annotations

import base64
import inspect
import json
import re
import shutil
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelHubMixin
from PIL import Image

from mtdiffusion_engine import Run, load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_registry import UserError


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run, evaluated, with its gallery."""
    run = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(tiny_run, run)
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert main(["gallery", str(run), "--device", "cpu"]) == 0
    return run


@pytest.fixture(scope="module")
def exported(run_folder: Path) -> Path:
    out = run_folder.parent / "exported"
    assert main(["export", str(run_folder), "--out", str(out), "--license", "apache-2.0", "--device", "cpu"]) == 0
    return out


def test_an_exported_run_samples_as_the_run_bit_for_bit(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    run, again = load_run(run_folder, device="cpu"), Run.from_pretrained(moved, device="cpu")
    for observed in ({}, {"label": 3}):
        expected, found = (each.sample(5, observed=observed, seed=1) for each in (run, again))
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
        for name, x in expected.items():
            assert torch.equal(found[name], x), name


def test_it_holds_the_averaged_weights_alone(run_folder: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "README.md",
        "config.toml",
        "plugins.json",
        "ema.safetensors",
        "state.json",
        "metrics.json",
        "metrics-directions.json",
        "gallery.png",
    }
    newest = load_run(run_folder, device="cpu").checkpoint
    assert (exported / "ema.safetensors").read_bytes() == (newest / "ema.safetensors").read_bytes()


def test_the_card_says_what_the_run_is_and_what_was_measured(run_folder: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    lines = dict(line.split(": ", 1) for line in header.splitlines())
    assert json.loads(lines["license"]) == "apache-2.0"
    assert json.loads(lines["library_name"]) == "mtdiffusion"
    assert "image" in json.loads(lines["tags"])
    metrics = json.loads((run_folder / "metrics.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| label given image |"))
    assert f"accuracy={metrics['label|image/accuracy']:.4g}↑" in row and "↑ higher is better" in text
    assert "10 steps of 8 samples" in text
    assert "| image | image | 1 × 8 × 8, float32 |" in text
    assert "![" in text and "](gallery.png)" in text
    assert 'Run.from_pretrained("FOLDER")' in text
    (install,) = re.findall(r"^pip install (.*)$", text, re.M)
    assert not re.search(r"(^| )mtdiffusion\b", install)  # of no index yet
    from huggingface_hub import ModelCard

    assert ModelCard.load(exported / "README.md").data.license == "apache-2.0"  # the Hub's own reader


def test_the_code_of_the_card_runs(exported: Path) -> None:
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace: dict[str, dict[str, torch.Tensor]] = {}
    exec(code.replace("FOLDER", str(exported)), namespace)
    assert torch.equal(namespace["more"]["image"], namespace["out"]["image"])


def test_the_card_tells_a_step_s_samples_whatever_it_was_shared_out_in(tmp_path: Path, tiny_config: Path) -> None:
    run = tmp_path / "run"
    options = ("--device", "cpu", "--set", "training.steps=1", "training.accumulate=4")
    assert main(["train", str(tiny_config), "--out", str(run), *options]) == 0
    out = load_run(run, device="cpu").save_pretrained(tmp_path / "out")
    assert "1 steps of 8 samples, seed" in (out / "README.md").read_text()


def test_what_was_not_made_of_these_weights_is_left_out(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    out = load_run(run, device="cpu").save_pretrained(tmp_path / "out")
    assert not (out / "metrics.json").exists()
    card = (out / "README.md").read_text()
    assert "were not evaluated" in card
    assert "None is given for the weights" in card
    assert "license:" not in card
    assert Image.open(out / "gallery.png").size[0] > 100  # samples, as there was no gallery


def test_the_commands_take_an_exported_run(
    exported: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(exported, here)
    on = ["--device", "cpu"]
    assert main(["sample", str(here), "-n", "2", "--out", str(tmp_path / "samples"), *on]) == 0
    assert main(["evaluate", str(here), "--samples", "4", *on]) == 0
    assert main(["gallery", str(here), "--out", str(tmp_path / "gallery.png"), *on]) == 0
    assert main(["export", str(here), "--out", str(tmp_path / "again"), *on]) == 0
    assert (tmp_path / "again/ema.safetensors").read_bytes() == (exported / "ema.safetensors").read_bytes()
    start = ["train", str(tiny_config), "--out", str(tmp_path / "new"), "--init-from", str(here)]
    assert main([*start, "--set", "training.steps=1", *on]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(here), *on]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    assert not (here / "checkpoints").exists()


def test_paths_of_data_are_cut_and_files_of_the_model_go_along(tmp_path: Path) -> None:
    data = tmp_path / "secret/mydata"
    data.mkdir(parents=True)
    (data / "caption.json").write_text(json.dumps({f"{i}": "a b" if i % 2 else "b" for i in range(40)}))
    words = tmp_path / "secret/words.txt"
    words.write_text("a\nb\n")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        data = {{ kind = "folder", root = "{data}", fields = {{ caption = "caption" }} }}
        latent = {{ height = 4, width = 4 }}
        modalities.caption = {{ kind = "text", length = 2, tokenizer = "words", file = "{words}" }}
        backbone = {{ kind = "unet", channels = 8, multipliers = [1], heads = 0, vector = 8 }}
        process.steps = 20
        training = {{ steps = 1, batch_size = 2, sample_every = 0 }}
        sampling.steps = 2
        """
    )
    assert main(["train", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    out = load_run(tmp_path / "run", device="cpu").save_pretrained(tmp_path / "elsewhere/out")
    text = (out / "config.toml").read_text()
    assert "secret" not in text + (out / "README.md").read_text()
    tables = tomllib.loads(text)
    assert tables["data"]["root"] == "mydata"
    assert tables["modalities"]["caption"]["file"] == "files/modalities/caption/file/words.txt"
    expected = load_run(tmp_path / "run", device="cpu").sample(3)["caption"]
    shutil.rmtree(tmp_path / "secret")
    run = Run.from_pretrained(out, device="cpu")
    assert torch.equal(run.sample(3)["caption"], expected)
    assert run.experiment.data.root == out / "mydata"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="mydata"):
        run.data("train")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / "files/modalities/caption/file/words.txt", other)
    (other / "caption.json").write_text(json.dumps({f"{i}": "a" for i in range(40)}))
    again = Run.from_pretrained(out, device="cpu", overrides=[f"data.root={other}"])
    assert len(again.data("train")) > 20


def test_a_plugin_that_is_missing_is_named_with_what_to_install(exported: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(exported, here)
    config = here / "config.toml"
    config.write_text(config.read_text().replace('kind = "unet"', 'kind = "waves"'))
    origin = {"distribution": "mtdiffusion-waves", "version": "1.2", "module": "mtdiffusion_waves"}
    origins = json.loads((here / "plugins.json").read_text()) | {"backbone.waves": origin}
    (here / "plugins.json").write_text(json.dumps(origins))
    with pytest.raises(UserError, match=r'waves.*pip install "mtdiffusion-waves==1\.2"'):
        Run.from_pretrained(here, device="cpu")


def test_a_folder_that_is_not_free_is_left_alone(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        load_run(tiny_run, device="cpu").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("no/such/folder", None, "expected the folder of a run, or OWNER/NAME"),
        ("nobody/nothing", None, "there is no such folder, and it could not be downloaded"),
        (".", "main", "revision = 'main' is of the Hub"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    name: str, revision: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        Run.from_pretrained(name, revision=revision)


PULL_REQUEST = {
    "title": "a title",
    "num": 1,
    "author": {"name": "me"},
    "createdAt": "2026-01-01T00:00:00.000Z",
    "status": "draft",
    "repo": {"name": "me/tiny", "type": "model"},
    "isPullRequest": True,
    "events": [],
    "changes": {"base": "refs/heads/main"},
    "filesWithConflicts": [],
}
"""As the Hub describes one."""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files needs; it keeps what is committed."""

    committed: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        self.asked.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self._answer({"url": f"https://huggingface.co/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.committed[line["value"]["path"]]
            page = "https://huggingface.co/me/tiny"
            done = {"commitUrl": f"{page}/commit/0", "commitOid": "0" * 40, "success": True}
            self._answer(done | ({"pullRequestUrl": f"{page}/discussions/1"} if "create_pr" in self.path else {}))
        else:
            self._answer({"type": "regular", "num": 1})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/tree/" in self.path:
            files = [{"type": "file", "path": path, "size": len(x), "oid": "0"} for path, x in self.committed.items()]
            self._answer(files)
        elif "/discussions/1" in self.path:
            self._answer(PULL_REQUEST)
        else:
            self._answer({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A local stand-in for the Hub, which cannot be reached from tests; the client is the real one."""
    Hub.committed, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub.committed
    server.shutdown()
    server.server_close()


def test_a_push_uploads_what_an_export_writes(run_folder: Path, exported: Path, hub: dict[str, bytes]) -> None:
    page = load_run(run_folder, device="cpu").push_to_hub("me/tiny", license="mit", token="hf_of_nobody")
    assert page.endswith("/me/tiny")
    expected = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert hub.keys() == expected.keys()
    assert hub["ema.safetensors"] == expected["ema.safetensors"]
    assert b'Run.from_pretrained("me/tiny")' in hub["README.md"]
    assert b'license: "mit"' in hub["README.md"]


def test_metrics_of_other_weights_do_not_stay_on_the_hub(tiny_run: Path, hub: dict[str, bytes], tmp_path: Path) -> None:
    hub |= {
        "metrics.json": b"{}",
        "metrics-directions.json": b"{}",
        "files/modalities/text/file/words.txt": b"a",
        "notes.md": b"mine",
    }
    run = load_run(shutil.copytree(tiny_run, tmp_path / "run"), device="cpu")  # which was not evaluated
    run.push_to_hub("me/tiny", token="hf_of_nobody")
    assert not [path for path in hub if path.startswith(("metrics", "files/"))]
    assert hub["notes.md"] == b"mine" and "ema.safetensors" in hub


def test_a_push_to_a_branch_or_as_a_pull_request(tiny_run: Path, hub: dict[str, bytes]) -> None:
    run = load_run(tiny_run, device="cpu")
    run.push_to_hub("me/tiny", token="hf_of_nobody", branch="v2")
    assert "/api/models/me/tiny/branch/v2" in Hub.asked
    assert any("/commit/v2" in path for path in Hub.asked)
    Hub.asked.clear()
    page = run.push_to_hub("me/tiny", token="hf_of_nobody", create_pr=True)
    assert page.endswith("/me/tiny/discussions/1")
    # How the client asks for it depends on its version.
    assert any("create_pr=1" in path or "/commit/refs%2Fpr%2F1" in path for path in Hub.asked), Hub.asked
    with pytest.raises(UserError, match="a pull request is to the main branch, found branch = 'v2'"):
        run.push_to_hub("me/tiny", branch="v2", create_pr=True)


@pytest.mark.parametrize("method", ["from_pretrained", "save_pretrained", "push_to_hub"])
def test_runs_take_what_the_hubs_own_models_take_by_the_same_names(method: str) -> None:
    """But for the configuration and the template of the card, which a run has of its own; a push within a save; and a
    part of an export, which is no run."""
    own = {"self", "config", "model_card_kwargs", "model_kwargs", "push_to_hub_kwargs"}
    own |= {"allow_patterns", "ignore_patterns", "delete_patterns"}
    own |= {"push_to_hub", "repo_id"} if method == "save_pretrained" else set()
    standard = inspect.signature(getattr(ModelHubMixin, method)).parameters
    ours = inspect.signature(getattr(Run, method)).parameters
    taken = {name: parameter.kind for name, parameter in standard.items() if name not in own}
    assert taken.items() <= {name: parameter.kind for name, parameter in ours.items()}.items()
    for name in taken.keys() - {"commit_message"}:
        assert ours[name].default == standard[name].default, name


def test_what_was_downloaded_serves_without_the_network(exported: Path, tmp_path: Path) -> None:
    commit = "1" * 40
    model = tmp_path / "models--me--tiny"
    shutil.copytree(exported, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "v1").write_text(commit)
    options = {"device": "cpu", "cache_dir": tmp_path, "local_files_only": True}
    run = Run.from_pretrained("me/tiny", revision="v1", **options)
    assert run.path == model / "snapshots" / commit
    with pytest.raises(UserError, match="could not be downloaded"):
        Run.from_pretrained("me/tiny", **options)  # the main branch is not there


def test_a_push_that_fails_says_what_to_do(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = load_run(tiny_run, device="cpu")
    with pytest.raises(UserError, match=r"could not be uploaded .* log in with `hf auth login`"):
        run.push_to_hub("me/tiny", token="hf_of_nobody")
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        run.push_to_hub("tiny")
