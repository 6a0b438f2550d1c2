"""The text modality: its distribution by enumeration, its tokenizers, captions of data sets, and CLIP's text tower."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Features, FeatureSpec, LatentSpec
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_plugins.clip import ClipConfig, ClipModality
from mtdiffusion_plugins.datasets.digits import DigitsConfig
from mtdiffusion_plugins.datasets.shapes import COLOURS, PLACES, SHAPES, ShapesConfig
from mtdiffusion_plugins.drawing import text_tiles
from mtdiffusion_plugins.embedders.open_clip import build_model, load_embedder
from mtdiffusion_plugins.text import TextConfig, TextModality
from mtdiffusion_plugins.text_tokenizers import ByteTokenizer, FileTokenizer, WordTokenizer, split_words
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import structure, unstructure
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.testing import modality as kit

FEATURES = FeatureSpec(16, 4, 4, 32)
WORDS = TextConfig(length=3, tokenizer="words", vocabulary=("three", "dark", "strokes"))
BYTES = TextConfig(length=12)


def build(config: TextConfig = WORDS, side: int = 4) -> TextModality:
    latent = LatentSpec(config.latent_channels(side, side), side, side)
    modality = config.build(latent, evolve(FEATURES, height=side, width=side))
    assert isinstance(modality, TextModality)
    return modality


def every_text() -> Tensor:
    rows = itertools.product(range(4), repeat=3)
    return torch.tensor([row for row in rows if all(b == 0 or a > 0 for a, b in itertools.pairwise(row))])


def logits(seed: int = 0) -> dict[str, Tensor]:
    return {"logits": 1.5 * torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def probabilities(params: dict[str, Tensor]) -> Tensor:
    x = every_text()
    return torch.exp(-build().decoder.nll({"logits": params["logits"].expand(len(x), -1, -1)}, x))


# The distribution.


def test_the_likelihood_sums_to_one_over_texts_of_every_length() -> None:
    assert len(every_text()) == 1 + 3 + 9 + 27
    assert probabilities(logits()).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(12))
def test_the_mode_is_the_most_likely_text(seed: int) -> None:
    expected = every_text()[probabilities(logits(seed)).argmax()]
    assert torch.equal(build().decoder.mode(logits(seed))[0], expected)


def test_the_expected_code_is_exact() -> None:
    modality = build().double()
    mean = (probabilities(logits()).reshape(-1, 1, 1, 1) * modality.encoder(every_text())).sum(0)
    torch.testing.assert_close(modality.decoder.expected_encoding(logits(), modality.encoder)[0], mean)


def test_samples_follow_the_distribution() -> None:
    params = {"logits": logits()["logits"].expand(20_000, -1, -1)}
    x = build().decoder.sample(params, torch.Generator().manual_seed(0))
    build().check(x)
    share = (x[:, None] == every_text()).all(2).double().mean(0)
    assert (share - probabilities(logits())).abs().max() < 0.01


def test_padding_counts_for_nothing() -> None:
    decoder, params = build().decoder, logits()
    moved = {"logits": params["logits"] + torch.tensor([0.0, 0.0, 7.0]).reshape(1, 3, 1) * torch.randn(4)}
    x = torch.tensor([[2, 0, 0]])
    assert torch.equal(decoder.nll(params, x), decoder.nll(moved, x))
    assert torch.equal(decoder.objective(params, x), decoder.nll(params, x) / 2)  # its token and its end
    full = torch.tensor([[2, 1, 3]])
    assert not torch.equal(decoder.nll(params, full), decoder.nll(moved, full))
    torch.testing.assert_close(decoder.objective(params, full), decoder.nll(params, full) / 3)
    assert decoder.dims_of(torch.cat([x, full])).tolist() == [2, 3]


# Codes.


@pytest.mark.parametrize("config", [WORDS, BYTES, evolve(BYTES, code_channels=7)])
def test_codes_have_the_size_of_noise_and_say_what_is_written(config: TextConfig) -> None:
    modality = build(config)
    encoder, tokens = modality.encoder, modality.tokenizer.size + 1
    x = torch.randint(1, tokens, (32, config.length), generator=torch.Generator().manual_seed(0))
    code = encoder(x)
    assert code.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    read = encoder.readout(code).unflatten(1, (config.length, -1))
    if tokens <= read.shape[2]:
        torch.testing.assert_close(read, F.one_hot(x, tokens).float(), atol=1e-5, rtol=0)
    else:
        assert torch.equal((read @ encoder.codes.T).argmax(2), x)  # type: ignore[operator]


def test_a_position_is_one_part_of_the_latent_and_no_other() -> None:
    encoder = build().encoder
    codes = encoder(torch.tensor([[1, 1, 1], [1, 2, 1]]))
    changed = (codes[0] != codes[1]).permute(1, 2, 0).flatten().nonzero()[:, 0].tolist()
    run = codes[0].numel() // 3
    assert set(changed) <= set(range(run, 2 * run)) and changed


def test_the_head_reads_texts_off_features_that_show_the_code_place_by_place() -> None:
    """Of features whose map is the code and whose vector says nothing: what the head reads is where it looks."""
    modality = build(TextConfig(length=8, tokenizer="words", vocabulary=tuple("abcdefghij")))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 11, (256, 8), generator=generator)
    x = x * (torch.arange(8) < torch.randint(0, 9, (256, 1), generator=generator))
    code = modality.encoder(x)
    features = Features(F.pad(code, (0, 0, 0, 0, 0, 16 - code.shape[1])), torch.zeros(256, 32))
    optimizer = torch.optim.Adam(modality.decoder.parameters(), 3e-2)
    for _ in range(120):
        optimizer.zero_grad()
        modality.decoder.objective(modality.decoder(features), x).mean().backward()
        optimizer.step()
    params = modality.decoder(features)
    found = modality.metrics(modality.decoder.mode(params), x)
    assert found["token_accuracy"] > 0.97 and found["edit_distance"] < 0.03
    assert modality.predictive_metrics(params, x)["readout_token_accuracy"] > 0.97


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (evolve(WORDS, code_channels=1, length=20), "20 positions of 3 tokens and an end need 2 numbers each, found 0"),
        (evolve(BYTES, code_channels=1), "12 positions of 256 tokens and an end need 9 numbers each, found 1"),
    ],
)
def test_a_latent_that_is_too_small_is_refused(config: TextConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config)


# Tokenizers.


@pytest.mark.parametrize("text", ["", "a bold three", "naïve – 三", "two\nlines", "tab\t."])
def test_bytes_are_read_and_written_exactly(text: str, tmp_path: Path) -> None:
    modality = build(evolve(BYTES, length=16))
    x = modality.from_text(text)
    assert modality.text(x) == text
    assert torch.equal(modality.parse(str(modality.write(x, tmp_path, "0000"))), x)


def test_bytes_that_are_no_text_are_shown_as_question_marks_and_can_be_read_again(tmp_path: Path) -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0xE4, 0x62]) == "a??b"
    modality = build(BYTES)
    for x in torch.randint(1, 257, (20, 12), generator=torch.Generator().manual_seed(0)):
        modality.check(modality.parse(str(modality.write(x, tmp_path, "0000")))[None])


def test_words_are_read_and_written_up_to_case_and_spaces() -> None:
    tokenizer = WordTokenizer(("a", "red", "ring", ",", "and", "cross", "well-drawn", "child's"))
    assert tokenizer.decode(tokenizer.encode("A red  ring,a well-drawn cross")) == "a red ring, a well-drawn cross"
    assert tokenizer.encode("child's") == [7]
    with pytest.raises(UserError, match="'a red rimg': the vocabulary of 8 words has no 'rimg'; did you mean \"ring\""):
        tokenizer.encode("a red rimg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "b", "a"), "found twice: a"),
        (("two words",), "'two', 'words'"),
        (("Red",), "in lower case"),
        (("",), "''"),
    ],
)
def test_a_bad_vocabulary_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(length=3, tokenizer="words", vocabulary=words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": "words"}, "either vocabulary = .* or file = .*, found neither"),
        ({"tokenizer": "words", "vocabulary": ("a",), "file": Path("a.txt")}, "found both"),
        ({"tokenizer": "file"}, "needs the path of a tokenizer.json"),
        ({"vocabulary": ("a",)}, 'vocabulary: tokenizer = "bytes" needs none'),
        ({"file": Path("a")}, 'file: tokenizer = "bytes" needs none'),
    ],
)
def test_keys_that_contradict_one_another_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(length=3, **values)  # type: ignore[arg-type]


def test_a_vocabulary_is_learned_from_a_file_and_weights_know_it(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("a red ring\na blue ring, a cross\n")
    config = TextConfig(length=6, tokenizer="words", file=path)
    first = build(config)
    assert isinstance(first.tokenizer, WordTokenizer)
    assert first.tokenizer.vocabulary == ("a", "ring", ",", "blue", "cross", "red")
    path.write_text("a red ring\na blue ring, a disc\n")  # as many words, another numbering
    with pytest.raises(RuntimeError, match="trained with another vocabulary or tokenizer file"):
        build(config).load_state_dict(first.state_dict())
    path.write_text("A blue ring; a red ring\na cross, a ring".replace(";", ""))  # the same words as often as before
    build(config).load_state_dict(first.state_dict())
    for content, message in ((" \n", "found no word"), (None, "no such file")):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(UserError, match=rf"captions\.txt: .*{message}"):
            build(config)


def test_a_config_is_written_and_read(tmp_path: Path) -> None:
    registry = Registry.discover()
    for config in (WORDS, BYTES, TextConfig(length=4, tokenizer="file", file=tmp_path / "tokenizer.json")):
        assert structure(registry, unstructure(registry, config), ModalityConfig, "test") == config


def test_a_tokenizer_file_is_read_without_its_special_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[UNK]", "[CLS]"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = [f"a large {colour} {kind} {place}" for colour in COLOURS for kind in SHAPES for place in PLACES]
    made.train_from_iterator(captions, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 1)])
    made.enable_truncation(3)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))

    config = TextConfig(length=20, tokenizer="file", file=path)
    modality = build(config)
    x = modality.from_text(captions[7])
    assert modality.text(x) == captions[7]
    assert 3 < int((x > 0).sum()) < len(captions[7]) / 2
    modality.check(x[None])
    with pytest.raises(UserError, match="expected at most 20 tokens, found"):
        modality.from_text(" ".join(captions[:3]))
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer\.json of the library"):
        build(config)


def test_a_missing_library_is_said_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'mtdiffusion\[tokenizers\]'"):
        FileTokenizer(Path("tokenizer.json"))


# Texts in and out.


def test_a_text_that_is_too_long_is_refused_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"at most 3 words, found 4 in 'three .*'; shorten it, or set length = 4 or more, or"
    ):
        build().from_text("three dark dark strokes")
    cut = build(evolve(WORDS, truncate=True)).from_text("three dark dark strokes")
    assert cut.tolist() == [1, 2, 2]
    path = tmp_path / "long.txt"
    path.write_text("three dark dark strokes\n")
    with pytest.raises(UserError, match=r"long\.txt: text: expected at most 3 words"):
        build().parse(str(path))
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        build().parse(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1, 0, 1]], "after the last token only"),
        ([[4, 0, 0]], "text of 3 words: expected values from 0 to 3, found 0 to 4"),
        ([[1, 0]], r"expected shape \[batch, 3\]"),
        ([[1.0, 0.0, 0.0]], "expected int64"),
    ],
)
def test_tokens_that_are_none_are_refused(x: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().check(torch.tensor(x))


def test_metrics_against_counts_by_hand() -> None:
    modality = build()
    found = modality.metrics(
        torch.tensor([[1, 2, 3], [1, 0, 0], [2, 3, 0]]), torch.tensor([[1, 2, 0], [1, 0, 0], [3, 0, 0]])
    )
    assert found == pytest.approx(
        {
            "token_accuracy": 3 / 6,
            "exact_match": 1 / 3,
            "edit_distance": (1 / 3 + 0 + 1 / 2) / 3,  # the last: one deletion, of two tokens
        }
    )
    truth = torch.tensor([[1, 0, 0], [2, 1, 3]])
    sure = {"logits": 30 * F.one_hot(torch.tensor([[1, 2, 2], [2, 1, 0]]), 4).double()}
    readout = modality.predictive_metrics(sure, truth)
    assert readout["readout_token_accuracy"] == pytest.approx(3 / 5)
    assert readout["nll_per_token"] == pytest.approx(2 * 30 / 5, abs=1e-3)


@pytest.mark.parametrize(
    "data", [DigitsConfig(), ShapesConfig(size=16, count=40, test_count=40)], ids=["digits", "shapes"]
)
def test_captions_of_data_sets_are_read(data: DigitsConfig | ShapesConfig, tmp_path: Path) -> None:
    dataset = data.build("test")
    captions = [str(dataset[index]["caption"]) for index in range(len(dataset))]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    most = max(len(split_words(caption)) for caption in captions)
    config = TextConfig(length=most, tokenizer="words", file=tmp_path / "captions.txt", field="caption")
    modality = build(config, side=8)
    batch = ModalityData(dataset, {"text": modality}).batch(range(len(dataset)))
    assert bool(batch.presence.all())
    assert [modality.text(x) for x in batch.x["text"]] == captions
    with pytest.raises(UserError, match=f"modality 'text': text: expected at most {most - 1} words, found {most}"):
        ModalityData(dataset, {"text": build(evolve(config, length=most - 1), side=8)}).verify()


def test_long_texts_are_legible_on_a_tile() -> None:
    long = "a large red circle at the top left, a small blue cross in the centre and a small pink ring at the right"
    tiles = text_tiles(["three", long, long + " or so", "x" * 500, ""])
    assert tiles.shape == (5, 3, 64, 64) and len(tiles.flatten(1).unique(dim=0)) == 5
    ink = (tiles[:, 0] > 0.5).float()
    assert not ink[:, :, [0, -1]].any() and not ink[:, [0, -1]].any()  # nothing runs over the edge
    rows = (ink[1].any(1)[1:] & ~ink[1].any(1)[:-1]).sum()
    assert rows >= 5  # in lines


def test_words_side_by_side_are_of_one_size() -> None:
    tall, short = (int((tile[0] > 0.5).any(1).sum()) for tile in text_tiles(["h", "lighthouse"]))
    alone = int((text_tiles(["h"])[0, 0] > 0.5).any(1).sum())
    assert tall <= short < alone  # g goes below the line


# CLIP's text tower.


def clip(**values: object) -> ClipModality:
    config = ClipConfig(**values)  # type: ignore[arg-type]
    modality = config.build(LatentSpec(config.latent_channels(8, 8), 8, 8), FeatureSpec(16, 8, 8, 32))
    assert isinstance(modality, ClipModality)
    return modality


def test_captions_are_embedded_by_the_text_tower_and_words_on_the_command_line_too() -> None:
    modality = clip(dim=32, source="caption", tower="text", model="builtin:digits")
    data = ModalityData(DigitsConfig().build("test"), {"clip": modality})
    caption = data.dataset[5]["caption"]
    expected = load_embedder("builtin:digits").embed_text([caption])[0]
    torch.testing.assert_close(data.batch([5]).x["clip"][0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(modality.parse(f"text: {caption}"), expected, atol=1e-5, rtol=1e-5)
    modality.check(data.batch(range(20)).x["clip"])


def test_words_find_pictures_of_what_they_say() -> None:
    """A model of pictures' embeddings can be asked by words: both towers lead into one space."""
    modality = clip(dim=32, source="image", model="builtin:digits")
    data = ModalityData(DigitsConfig().build("test"), {"clip": modality})
    words = torch.stack([modality.parse(f"text: a handwritten {number}") for number in ("three", "seven")])
    labels = torch.stack([data.dataset[index]["label"] for index in range(len(data))])  # type: ignore[arg-type]
    nearest = modality.similarity(words, data.batch(range(len(data))).x["clip"]).topk(10).indices
    assert (labels[nearest] == torch.tensor([[3], [7]])).double().mean() > 0.9


@pytest.mark.parametrize(
    ("values", "source", "message"),
    [
        ({"source": "caption"}, ["a handwritten three"], 'holds texts, which tower = "image" .* set tower = "text"'),
        ({"source": "image", "tower": "text"}, torch.zeros(1, 1, 8, 8), 'holds tensors, which tower = "text"'),
    ],
)
def test_the_tower_must_be_the_source_s(values: dict[str, str], source: list[str] | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip(dim=32, model="builtin:digits", **values).derive(source)


def test_words_that_cannot_be_embedded_are_refused() -> None:
    with pytest.raises(UserError, match="expected words after 'text:', found none"):
        clip(dim=32, source="image", model="builtin:digits").parse("text: ")
    with pytest.raises(UserError, match=r"no clip\.model is configured to embed words with"):
        clip(dim=32).parse("text: a handwritten three")
    with pytest.raises(UserError, match="does not know every word of 'a handwritten zebra'"):
        clip(dim=32, source="image", model="builtin:digits").parse("text: a handwritten zebra")
    with pytest.raises(ValueError, match=r'tower = "text" says how a source is embedded, and there is none'):
        ClipConfig(dim=32, tower="text", model="builtin:digits")


def test_an_open_clip_model_of_one_s_own_reads_any_words(tmp_path: Path) -> None:
    """A tiny open_clip model with random weights, read by open_clip's own tokenizer from files."""
    description = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "head_width": 16, "layers": 1},
            "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
    }
    torch.manual_seed(0)
    config, weights = tmp_path / "random_tiny_clip.json", tmp_path / "random_tiny_clip.safetensors"
    config.write_text(json.dumps(description))
    model = build_model(description)
    save_file(model.state_dict(), weights)
    modality = clip(dim=16, source="caption", tower="text", model=str(config), checkpoint=str(weights))
    found = modality.derive(["a red circle left of a square", "zebras"])
    modality.check(found)
    assert (found[0] - found[1]).norm() > 1e-3
    torch.testing.assert_close(modality.parse("text: zebras"), found[1], atol=1e-5, rtol=1e-5)


def test_the_conformance_kit_derives_from_texts() -> None:
    captions = [str(DigitsConfig().build("test")[index]["caption"]) for index in range(4)]
    config = ClipConfig(dim=32, source="caption", tower="text", model="builtin:digits")
    subject = kit.ModalitySubject(config, source=captions, height=4, width=4)
    kit.data.derive.function(subject)
    kit.data.examples.function(subject)
    with pytest.raises(ValueError, match="holds texts"):
        kit.data.derive.function(evolve(subject, config=evolve(config, source="image", tower="image")))
