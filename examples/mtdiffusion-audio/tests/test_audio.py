import math
import wave
from pathlib import Path

import pytest
import torch
from mtdiffusion_audio.digit_tones import VOCABULARY, DigitTonesConfig, describe
from mtdiffusion_audio.field import AudioField
from mtdiffusion_audio.task import SpokenDigitsConfig
from mtdiffusion_audio.tone_reader import ToneReaderConfig
from mtdiffusion_audio.tones import PAIRS, read, synthesise
from mtdiffusion_audio.waveform import AudioConfig, AudioModality, Folding, mdct
from torch import Tensor

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_registry import Registry, UserError, testing

CONFIG = AudioConfig()


def sounds(count: int = 12) -> Tensor:
    return synthesise(torch.arange(count) % 10, 1024, 8000, torch.Generator().manual_seed(0))


def build(config: AudioConfig = CONFIG) -> AudioModality:
    modality = config.build(LatentSpec(config.latent_channels(8, 8), 8, 8), FeatureSpec(16, 8, 8, 32))
    assert isinstance(modality, AudioModality)
    return modality


# --- the modality -----------------------------------------------------------------------------------------------------


def test_contract() -> None:
    testing.check_modality(CONFIG, examples=sounds())


@pytest.mark.parametrize(
    "name", ["modality.audio", "field.audio", "dataset.digit_tones", "evaluator.tone_reader", "task.spoken_digits"]
)
def test_it_is_installed(name: str) -> None:
    group, _, kind = name.partition(".")
    assert Registry.discover().config_class(group, kind).kind == kind


def test_sounds_of_a_folder_are_read_as_they_were_written(tmp_path: Path) -> None:
    modality, x = build(), sounds(4)
    for split in ("train", "test"):
        for index, sound in enumerate(x):
            (tmp_path / split / "audio").mkdir(parents=True, exist_ok=True)
            modality.write(sound, tmp_path / split / "audio", f"{index}")
    data = FolderConfig(root=tmp_path, fields={"audio": AudioField()}).build("train")
    for index in range(4):
        torch.testing.assert_close(data[index]["audio"], x[index], atol=1e-4, rtol=0)
    short = FolderConfig(root=tmp_path, fields={"audio": AudioField(samples=1500)}).build("train")[0]["audio"]
    assert short.shape == (1500,) and not short[1024:].any()
    wav = (tmp_path / "train" / "audio" / "0.wav").read_bytes()
    testing.check_field(AudioField(), files={".wav": wav})
    with pytest.raises(UserError, match=r"0\.wav: expected 16000 samples a second, found 8000"):
        FolderConfig(root=tmp_path, fields={"audio": AudioField(rate=16000)}).build("train")


@pytest.mark.parametrize(("frames", "bins"), [(2, 4), (8, 16), (5, 6)])
def test_the_transform_is_orthonormal(frames: int, bins: int) -> None:
    matrix = mdct(frames, bins).flatten(0, 1).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(frames * bins, dtype=torch.float64), atol=1e-6)


def test_a_tone_lies_in_the_row_of_its_frequency_and_a_click_in_the_column_of_its_time() -> None:
    folding = Folding(8, 128, 8, 8)
    tone = torch.sin(2 * math.pi * 1250 / 8000 * torch.arange(1024))
    by_row = folding(tone[None]).square().sum((1, 3))[0]
    assert by_row.argmax() == 2 and by_row[2] > 0.95 * by_row.sum()  # 1000 to 1500 Hz of 8 rows of 500
    click = torch.zeros(1, 1024)
    click[0, 6 * 128] = 1
    by_column = folding(click).square().sum((1, 2))[0]
    assert by_column[5:7].sum() > 0.99


def test_nothing_is_lost_and_energy_is_kept() -> None:
    encoder, x = build().encoder, sounds()
    e = encoder(x)
    assert torch.allclose(encoder.folding.inverse(e) * encoder.rms, x, atol=1e-5)
    assert e.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_the_likelihood_is_the_gaussian_s() -> None:
    x, decoder = sounds(3), build().decoder
    params = {"mean": 0.9 * x, "log_scale": torch.tensor([-1.0, -2.0, 0.0])}
    gaussian = torch.distributions.Normal(params["mean"], CONFIG.rms * params["log_scale"].exp()[:, None])
    assert torch.allclose(decoder.nll(params, x), -gaussian.log_prob(x).sum(1), rtol=1e-4)


def test_metrics_know_loud_from_quiet_and_right_from_wrong() -> None:
    modality, x = build(), sounds(3)
    half = modality.metrics(x / 2, x)
    assert half["snr_db"] == pytest.approx(20 * math.log10(2), abs=0.01)
    # -6 dB at every frequency above the floor, and there are many at it
    assert 0 < half["log_spectral_distance"] < 20 * math.log10(2)
    assert modality.metrics(x, x) == pytest.approx({"log_spectral_distance": 0, "snr_db": 100})
    assert modality.metrics(x.roll(1, 0), x)["log_spectral_distance"] > half["log_spectral_distance"]
    assert set(half) == set(AudioModality.metric_directions)


def test_files_are_wav_of_16_bits(tmp_path: Path) -> None:
    modality, x = build(), sounds(1)[0]
    path = modality.write(x, tmp_path, "a")
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (1, 2, 8000, 1024)
    assert (modality.parse(str(path)) - x).abs().max().item() <= 0.51 / 32767


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    modality = build()
    build(AudioConfig(rate=16000)).write(sounds(1)[0], tmp_path, "fast")
    build(AudioConfig(samples=2048)).write(torch.zeros(2048), tmp_path, "long")
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "header.wav").write_bytes(b"RIFF\0\0")
    with wave.open(str(tmp_path / "empty.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
    cut = modality.write(sounds(1)[0], tmp_path, "cut")
    cut.write_bytes(cut.read_bytes()[:-100])
    for name, channels, size in (("fine", 1, 3), ("stereo", 2, 2)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((channels, size, 8000, 0, "NONE", ""))
            file.writeframes(bytes(6 * 1024))
    cases = {
        "fast.wav": "found 1024 at 16000 Hz; convert it: ffmpeg -i OLD.wav -ac 1 -ar 8000 -af apad -t 0.128",
        "fine.wav": "1 channel of 16 bits, found 1 of 24; convert it: ffmpeg -i OLD.wav -ac 1 -c:a pcm_s16le NEW.wav",
        "stereo.wav": "found 2 of 16; convert it: ffmpeg",
        "long.wav": "2048",
        "text.wav": "cannot be read",
        "cut.wav": "cut",
        "empty.wav": "holds no sound",
        "header.wav": "it ends within its header",
        "no.wav": "no such",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said) as error:
            modality.parse(str(tmp_path / name))
        assert name in str(error.value)


def test_a_sound_is_observed_as_the_data_set_reads_it(tmp_path: Path) -> None:
    modality, field = build(), AudioField()
    build(AudioConfig(samples=2048)).write(torch.linspace(-1, 1, 2048), tmp_path, "long")
    modality.data_field = FolderConfig(root=tmp_path, fields={"audio": field}).data_field("audio")
    path = tmp_path / "long.wav"
    assert torch.equal(modality.parse(str(path)), field.read(path))


def test_what_does_not_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="8 frames of 128 frequencies"):
        CONFIG.latent_channels(8, 16)
    with pytest.raises(ValueError, match="divide samples"):
        AudioConfig(samples=1024, frames=6)


# --- data set, evaluator, task ----------------------------------------------------------------------------------------


def test_data_set_contract() -> None:
    testing.check_dataset(DigitTonesConfig())


def test_every_digit_has_its_own_tones_and_the_reader_hears_them() -> None:
    assert len(set(PAIRS)) == 10
    for split in ("train", "test"):
        data = DigitTonesConfig().build(split)  # type: ignore[arg-type]
        audio = torch.stack([data[i]["audio"] for i in range(len(data))])  # type: ignore[misc]
        label = torch.stack([data[i]["label"] for i in range(len(data))])  # type: ignore[misc]
        assert (read(audio, 8000) == label).double().mean() > 0.99
        assert audio.square().mean().sqrt().item() == pytest.approx(CONFIG.rms, rel=0.05)


def test_the_reader_is_at_chance_on_noise() -> None:
    noise = 0.3 * torch.randn(2000, 1024, generator=torch.Generator().manual_seed(0))
    label = torch.arange(2000) % 10
    assert (read(noise, 8000) == label).double().mean().item() == pytest.approx(0.1, abs=0.03)


def test_tokens_are_the_caption() -> None:
    data = DigitTonesConfig().build("test")
    lengths = set()
    for i in range(len(data)):
        sample = data[i]
        tokens = [t for t in sample["tokens"].tolist() if t]  # type: ignore[union-attr]
        assert " ".join(VOCABULARY[t - 1] for t in tokens) == sample["caption"]
        lengths.add(len(tokens))
    assert lengths == {1, 3}
    assert describe(3, 0.5) == "three dark strokes"


def test_another_seed_sounds_different() -> None:
    a, b = (DigitTonesConfig(seed=seed).build("train")[0]["audio"] for seed in (0, 1))
    assert not torch.equal(a, b)  # type: ignore[arg-type]


def test_the_evaluator_judges_audio_and_nothing_else() -> None:
    config = ToneReaderConfig()
    testing.check_evaluator(config, data={"audio": sounds(40), "label": torch.arange(40) % 10})
    real = {"audio": sounds(10), "label": torch.arange(10)}
    reader = config.build(real)
    assert reader.real(real) == {"tone_accuracy": 1.0}
    assert reader.joint({**real, "label": torch.arange(10).flip(0)}) == {"tone_agreement": 0.0}
    assert reader.joint({"label": real["label"]}) == {}
    assert reader.conditional("audio", {"audio": real["audio"].roll(1, 0)}, real) == {"tone_accuracy": 0.0}
    assert reader.conditional("label", real, real) == {}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"label": torch.zeros(2)}, "no modality named 'audio'"),
        ({"audio": torch.zeros(2, 10), "label": torch.zeros(2).long()}, "at least 256"),
        ({"audio": torch.zeros(2, 1024), "label": torch.zeros(2)}, "class indices"),
    ],
)
def test_the_evaluator_refuses_what_it_cannot_hear(train: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ToneReaderConfig().build(train)


def test_the_task_asks_about_its_own_instances() -> None:
    task = SpokenDigitsConfig()
    testing.check_task(task)
    asked = {name for query in task.queries() for name in (*query.observed, *query.targets)}
    assert asked == set(task.instances())
    assert task.queries()[0].key("label") == "label|audio"
    assert task.queries()[-1].joint
