import math
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from mtdiffusion_speech.field import LogMelField
from mtdiffusion_speech.logmel import LogMelConfig, LogMelModality
from mtdiffusion_speech.spectrogram import RANGE, LogMel, read_wav, write_wav
from mtdiffusion_speech.spoken_digits import SpokenDigitsConfig, pair
from scipy.io import wavfile
from torch import Tensor

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_registry import Registry, UserError, testing

CONFIG = LogMelConfig()
SPECTROGRAM = CONFIG.spectrogram


def tone(hertz: float, seconds: float = 0.5, rate: int = 8000) -> Tensor:
    return 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def vowels(count: int = 8, rate: int = 8000) -> list[Tensor]:
    """Harmonics of a gliding pitch below two formants, in a little noise: like speech, and each another."""
    draw = torch.Generator().manual_seed(0)
    sounds = []
    for _ in range(count):
        length, pitch, first, second = (a + (b - a) * torch.rand((), generator=draw) for a, b in RANGES)
        time = torch.arange(int(length * rate)) / rate
        phase = 2 * math.pi * (pitch * time - 20 * time**2)
        sound = torch.zeros_like(time)
        for k in range(1, 20):
            loud = sum(1 / (1 + ((k * pitch - formant) / 150) ** 2) for formant in (first, second))
            sound = sound + loud * torch.sin(k * phase)
        sounds.append(0.1 * sound * torch.sin(math.pi * time / length) + 1e-3 * torch.randn(len(time), generator=draw))
    return sounds


RANGES = ((0.3, 0.8), (90.0, 200.0), (300.0, 900.0), (1200.0, 3000.0))  # seconds; pitch and formants in Hz


def spectrograms() -> Tensor:
    return torch.stack([SPECTROGRAM.analyse(sound) for sound in vowels()])


def build(config: LogMelConfig = CONFIG, side: int = 8) -> LogMelModality:
    latent = LatentSpec(config.latent_channels(side, side), side, side)
    modality = config.build(latent, FeatureSpec(16, side, side, 32))
    assert isinstance(modality, LogMelModality)
    return modality


def recordings(root: Path) -> Path:
    """Two speakers who say every digit, twice for training and once held out: a tone of its own for each."""
    root.mkdir()
    for digit in range(10):
        for speaker, shift in (("ann", 0), ("bob", 25)):
            for number in (0, 5, 17):
                write_wav(tone(300 + 200 * digit + shift), root / f"{digit}_{speaker}_{number}.wav", 8000)
    return root


# --- sound and spectrogram --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hertz", [200, 1000, 3000])
def test_a_tone_is_loudest_in_the_band_of_its_frequency(hertz: float) -> None:
    x = SPECTROGRAM.analyse(tone(hertz))
    band = int(x[0, :, 10].argmax())
    corners = np.linspace(mel(50), mel(4000), 34)
    assert corners[band] <= mel(hertz) <= corners[band + 2]
    assert x.shape == (1, 32, 32) and x.max() == 1 and x.min() == -1


def mel(hertz: float) -> float:
    return 1127.01048 * math.log(1 + hertz / 700)  # the same scale with a natural logarithm


def test_levels_are_decibels_below_the_loudest_and_loudness_is_not_kept() -> None:
    quiet = torch.cat([tone(1000, 0.3), 0.1 * tone(1000, 0.3)])  # 20 dB less
    x = SPECTROGRAM.analyse(quiet)
    level = x[0].max(0).values
    assert (level[5] - level[25]).item() == pytest.approx(2 * 20 / RANGE, abs=0.01)
    torch.testing.assert_close(SPECTROGRAM.analyse(quiet / 4), x, atol=1e-4, rtol=0)


def test_short_recordings_are_followed_by_silence_and_long_ones_are_cut() -> None:
    sound = tone(1000, 2.0)
    assert (SPECTROGRAM.analyse(sound[:1600])[..., 12:] == -1).all()  # 0.2 s of 0.64 s
    torch.testing.assert_close(SPECTROGRAM.analyse(sound), SPECTROGRAM.analyse(sound[: 32 * 160]))


def test_the_bands_add_up_to_one_between_their_middles() -> None:
    filters = SPECTROGRAM.filters()
    assert filters.shape == (32, 161)
    inner = filters.sum(0)[5:150]  # 125 to 3725 Hz, within the middles of the first and the last
    torch.testing.assert_close(inner, torch.ones_like(inner), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="200 are too many"):
        LogMel(8000, 200, 32).filters()


def test_what_is_synthesised_has_about_the_spectrogram_that_was_asked_for() -> None:
    x = spectrograms()
    again = torch.stack([SPECTROGRAM.analyse(SPECTROGRAM.synthesise(each)) for each in x])
    distance = build().metrics(again, x)["log_mel_distance"]
    assert distance < 5  # dB; of another of these sounds it is more than 10
    assert build().metrics(x.roll(1, 0), x)["log_mel_distance"] > 2 * distance
    x = x[0]
    assert torch.equal(SPECTROGRAM.synthesise(x), SPECTROGRAM.synthesise(x))


def test_recordings_of_another_rate_are_resampled_and_channels_averaged(tmp_path: Path) -> None:
    left, right = tone(500, rate=44100), tone(1500, rate=44100)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes((torch.stack([left, right], 1) * 32767).round().numpy().astype("<i2").tobytes())
    sound = read_wav(tmp_path / "stereo.wav", 8000)
    assert len(sound) == 4000
    inside = slice(200, 3800)  # away from the filter's ends
    expected = ((tone(500) + tone(1500)) / 2)[inside]
    torch.testing.assert_close(sound[inside], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("form", "error"), [("u1", 2**-7), ("i2", 2**-14), ("i3", 2**-22), ("i4", 1e-7)])
def test_integers_of_any_width_are_read(form: str, error: float, tmp_path: Path) -> None:
    """Written by the standard library alone; with the header of many channels, read by scipy."""
    sound, size = 0.9 * tone(500, rate=8000).double().numpy(), int(form[1])
    scaled = (sound * (2 ** (8 * size - 1) - 1)).round().astype(np.int64) + (128 if form == "u1" else 0)
    data = b"".join(int(value).to_bytes(size, "little", signed=form != "u1") for value in scaled)
    with wave.open(str(tmp_path / "plain.wav"), "wb") as file:
        file.setparams((1, size, 8000, 0, "NONE", ""))
        file.writeframes(data)
    plain = (tmp_path / "plain.wav").read_bytes()
    # WAVE_FORMAT_EXTENSIBLE: the format, its bits and its channels follow in 24 bytes.
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    form_chunk = struct.pack("<HHIIHHHHI", 0xFFFE, *struct.unpack("<HIIHH", plain[22:36]), 22, 8 * size, 4) + guid
    chunks = b"WAVEfmt " + struct.pack("<I", len(form_chunk)) + form_chunk + plain[36:]
    (tmp_path / "extensible.wav").write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    for name in ("plain.wav", "extensible.wav"):
        read = read_wav(tmp_path / name, 8000)
        assert read.dtype == torch.float32
        torch.testing.assert_close(read.double(), torch.from_numpy(sound), atol=error, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_read(dtype: type, tmp_path: Path) -> None:
    left, right = tone(500).double().numpy(), 1.5 * tone(1500).double().numpy()
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([left, right], 1).astype(dtype))
    expected = torch.from_numpy((left + right) / 2).clamp(-1, 1).float()
    torch.testing.assert_close(read_wav(tmp_path / "a.wav", 8000), expected, atol=1e-6, rtol=0)
    modality = build()
    read = modality.parse(str(tmp_path / "a.wav"))
    modality.check(read[None])


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "header.wav").write_bytes(b"RIFF\0\0")
    write_wav(tone(500), tmp_path / "cut.wav", 8000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-100])
    wavfile.write(tmp_path / "float.wav", 8000, tone(500).numpy())
    (tmp_path / "half.wav").write_bytes((tmp_path / "float.wav").read_bytes()[:-100])
    content = bytearray((tmp_path / "float.wav").read_bytes())
    content[20] = 7  # µ-law, by the header
    (tmp_path / "law.wav").write_bytes(content)
    wavfile.write(tmp_path / "nan.wav", 8000, np.array([0.5, np.nan], np.float32))
    write_wav(torch.zeros(0), tmp_path / "empty.wav", 8000)
    cases = {
        "text": "cannot be read",
        "cut": "cut short",
        "half": r"cut short: expected \d+ bytes",
        "law": "convert it: ffmpeg -i OLD.wav -c:a pcm_s16le NEW.wav",
        "nan": "expected finite samples",
        "empty": "holds no sound",
        "header": "it ends within its header",
        "no": "no such",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said) as error:
            build().parse(str(tmp_path / f"{name}.wav"))
        assert f"{name}.wav" in str(error.value)


# --- modality and field -----------------------------------------------------------------------------------------------


def test_contract() -> None:
    testing.check_modality(CONFIG, examples=spectrograms())
    testing.check_modality(LogMelConfig(bands=16, frames=24), examples=spectrograms()[..., ::2, :24])


@pytest.mark.parametrize("name", ["modality.logmel", "field.logmel", "dataset.spoken_digits"])
def test_it_is_installed(name: str) -> None:
    group, _, kind = name.partition(".")
    assert Registry.discover().config_class(group, kind).kind == kind


def test_a_place_of_the_code_holds_its_bands_and_frames_and_nothing_is_lost() -> None:
    encoder, x = build().encoder, spectrograms()
    e = encoder(x)
    torch.testing.assert_close(encoder.patches.inverse(e), x)
    x[:, :, 8:12, 20:24] += 0.1  # the third row of places, the sixth column
    changed = (encoder(x) - e).abs().sum(1) > 1e-6
    assert changed[:, 2, 5].all() and changed.sum() == len(x)


def test_the_likelihood_is_the_gaussian_s() -> None:
    x, decoder = spectrograms()[:3], build().decoder
    params = {"mean": 0.9 * x, "log_scale": torch.tensor([-1.0, -2.0, 0.0])}
    gaussian = torch.distributions.Normal(params["mean"], CONFIG.std * params["log_scale"].exp()[:, None, None, None])
    assert torch.allclose(decoder.nll(params, x), -gaussian.log_prob(x).flatten(1).sum(1), rtol=1e-4)


def test_the_distance_is_in_decibels() -> None:
    x = spectrograms().clamp(-0.5, 0.5)
    metrics = build().metrics(x + 0.1, x)
    assert metrics == {"log_mel_distance": pytest.approx(0.1 * RANGE / 2, rel=1e-4)}
    assert set(metrics) == set(LogMelModality.metric_directions)


def test_high_frequencies_are_shown_at_the_top() -> None:
    picture = build().render(SPECTROGRAM.analyse(tone(3500))[None])[0].sum(0)
    assert picture[:6].sum() > 5 * picture[-6:].sum()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bands of 32 frames do not fill a latent of 8 × 12"):
        CONFIG.latent_channels(8, 12)
    with pytest.raises(ValueError, match="bands and frames of modality and data set"):
        build().check(torch.zeros(2, 1, 32, 16))
    with pytest.raises(ValueError, match=r"levels in \[-1, 1\], found -60 to 0"):
        build().check(torch.linspace(-60, 0, 1024).reshape(1, 1, 32, 32))
    with pytest.raises(ValueError, match="too many"):
        build(LogMelConfig(bands=200))


def test_recordings_of_a_folder_are_read_as_spectrograms(tmp_path: Path) -> None:
    sounds = vowels(4)
    for split in ("train", "test"):
        (tmp_path / split / "speech").mkdir(parents=True)
        for index, sound in enumerate(sounds):
            write_wav(sound, tmp_path / split / "speech" / f"{index}.wav", 8000)
    data = FolderConfig(root=tmp_path, fields={"speech": LogMelField()}).build("train")
    modality = build()
    for index in range(4):
        path = tmp_path / "train" / "speech" / f"{index}.wav"
        torch.testing.assert_close(data[index]["speech"], modality.parse(str(path)))
    testing.check_field(LogMelField(frames=20), files={".wav": path.read_bytes()})


# --- data set ---------------------------------------------------------------------------------------------------------


def test_data_set_contract(tmp_path: Path) -> None:
    testing.check_dataset(SpokenDigitsConfig(root=recordings(tmp_path / "recordings")))


def test_each_recording_has_a_picture_of_its_digit_and_no_recording_or_picture_is_in_both_splits(
    tmp_path: Path,
) -> None:
    from sklearn.datasets import load_digits

    recordings(tmp_path / "recordings")
    bunch = load_digits()
    known = {
        tuple(pixels.ravel().tolist()): int(label) for pixels, label in zip(bunch.images, bunch.target, strict=True)
    }
    seen = {}
    for split, count in (("train", 40), ("test", 20)):
        data = SpokenDigitsConfig(root=tmp_path).build(split)  # type: ignore[arg-type]
        assert len(data) == count
        seen[split] = {tuple(((data[i]["image"] + 1) * 8).flatten().tolist()) for i in range(count)}  # type: ignore[operator, union-attr]
        for i in range(count):
            sample = data[i]
            digit, speaker, number = Path(data.describe(i)).stem.split("_")
            assert known[tuple(((sample["image"] + 1) * 8).flatten().tolist())] == int(digit) == int(sample["label"])  # type: ignore[operator, union-attr]
            assert sample["speaker"] == speaker
            assert (int(number) < 5) == (split == "test")
            expected = SPECTROGRAM.analyse(tone(300 + 200 * int(digit) + 25 * (speaker == "bob")))
            torch.testing.assert_close(sample["speech"], expected, atol=0.02, rtol=0)
    assert not seen["train"] & seen["test"]


def test_pairs_are_random_follow_from_the_seed_and_use_every_picture_before_one_twice() -> None:
    recorded, pictures = torch.arange(90) % 3, torch.arange(60) % 3
    shown = pair(recorded, pictures, torch.Generator().manual_seed(0))
    assert torch.equal(pictures[shown], recorded)
    counts = torch.bincount(shown, minlength=60)
    assert counts.min() == 1 and counts.max() == 2
    assert torch.equal(shown, pair(recorded, pictures, torch.Generator().manual_seed(0)))
    assert not torch.equal(shown, pair(recorded, pictures, torch.Generator().manual_seed(1)))


def test_in_training_a_recording_may_come_with_another_picture_of_its_digit_each_time(tmp_path: Path) -> None:
    recordings(tmp_path / "recordings")
    testing.check_dataset(SpokenDigitsConfig(root=tmp_path, pairing="random"))
    data = SpokenDigitsConfig(root=tmp_path, pairing="random").build("train")
    pictures = data.pictures[int(data[0]["label"])]  # type: ignore[attr-defined, arg-type]
    seen = [data.varied(0, seed)["image"] for seed in range(20)]
    assert all(bool((pictures == picture).flatten(1).all(1).any()) for picture in seen)  # of its class
    assert len({tuple(picture.flatten().tolist()) for picture in seen}) > 10  # type: ignore[union-attr]
    assert torch.equal(data.varied(0, 3)["speech"], data[0]["speech"])  # type: ignore[arg-type]
    fixed = SpokenDigitsConfig(root=tmp_path).build("train")
    assert torch.equal(fixed.varied(0, 3)["image"], fixed[0]["image"])  # type: ignore[arg-type]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no such folder; expected the recordings of the Free Spoken Digit"):
        SpokenDigitsConfig(root=tmp_path / "gone").build("train")
    write_wav(tone(500), tmp_path / "7_ann_0.wav", 8000)
    with pytest.raises(UserError, match="no recordings for the split 'train'"):
        SpokenDigitsConfig(root=tmp_path).build("train")
    write_wav(tone(500), tmp_path / "seven.wav", 8000)
    with pytest.raises(UserError, match=r"seven\.wav: expected a name such as 7_jackson_32\.wav"):
        SpokenDigitsConfig(root=tmp_path).build("test")
