import hashlib
import json
import shutil

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from mtdiffusion_engine.cli import main as cli
from mtdiffusion_plugins.datasets._tensors import TensorDataset
from mtdiffusion_plugins.datasets.digits import DigitsConfig
from mtdiffusion_plugins.datasets.shapes import PLACES, ShapesConfig
from mtdiffusion_plugins.embedders import open_clip as embedders
from mtdiffusion_plugins.embedders.open_clip import WEIGHTS, Preprocessing, load_embedder
from mtdiffusion_plugins.embedders.own_recipe import recipe_of
from mtdiffusion_plugins.embedders.recipes import (
    RECIPES,
    Recipe,
    evaluate_digits,
    evaluate_scenes,
    evaluate_shapes,
    shapes_captions,
)
from mtdiffusion_plugins.embedders.train_clip import augment, contrastive_loss, describe, main, save, train
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.registry import Registry

CONFIG, CHECKPOINT = WEIGHTS / "digits_clip.json", WEIGHTS / "digits_clip.safetensors"


@pytest.fixture(scope="module")
def digits():
    return load_embedder("builtin:digits")


@pytest.fixture(scope="module")
def images():
    data = DigitsConfig().build("test")
    return torch.stack([data[index]["image"] for index in range(len(data))])


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(digits, images):
    codes = digits.embed(images[:50])
    assert codes.shape == (50, digits.dim) == (50, 32) and codes.dtype == torch.float32
    assert torch.allclose(codes.norm(dim=1), torch.ones(50), atol=1e-6)
    assert torch.allclose(codes, digits.embed(images[:50], batch=7), atol=1e-5)
    assert digits.embed(images[:0]).shape == (0, 32)
    # They tell digits of one class apart, too.
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 1e-2


def test_grey_and_colour_pictures_of_one_scene_are_one(digits, images):
    grey = digits.embed(images[:8])
    assert torch.allclose(grey, digits.embed(images[:8].expand(-1, 3, -1, -1)), atol=1e-6)
    # Enlarged by copying pixels, then scaled back with antialiasing: nearly the same picture.
    large = images[:8].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert (grey * digits.embed(large)).sum(dim=1).min() > 0.9


def test_images_of_a_wrong_shape_are_refused(digits):
    for shape in ((1, 8, 8), (2, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be \[B, 1 or 3, h, w\]"):
            digits.embed(torch.zeros(shape))


def test_the_model_is_frozen(digits):
    assert not digits.model.training
    assert not any(parameter.requires_grad for parameter in digits.model.parameters())


def test_the_shipped_weights_know_the_test_digits(digits):
    accuracy = evaluate_digits(digits)
    assert accuracy["label"] > 0.95 and accuracy["weight"] > 0.75 and accuracy["slant"] > 0.65
    stated = json.loads(CONFIG.read_text())["zero_shot_test_accuracy"]
    assert accuracy == pytest.approx(stated, abs=0.01)


def test_the_shipped_weights_know_the_test_scenes_at_their_size_and_twice_that():
    shapes = load_embedder("builtin:shapes")
    accuracy = evaluate_shapes(shapes)
    stated = json.loads((WEIGHTS / "shapes_clip.json").read_text())["zero_shot_test_accuracy"]
    assert accuracy == pytest.approx(stated, abs=0.01)
    # Chance: 0.2, 0.125, 0.11, 0.002.
    assert accuracy["label"] > 0.6 and accuracy["colour"] > 0.9 and accuracy["place"] > 0.75
    assert accuracy["image_to_text_at_1"] > 0.5 and accuracy["text_to_image_at_1"] > 0.5
    assert evaluate_shapes(shapes, size=32) == pytest.approx(accuracy, abs=0.05)


def test_the_shipped_weights_know_the_test_landscapes():
    accuracy = evaluate_scenes(load_embedder("builtin:scenes"))
    stated = json.loads((WEIGHTS / "scenes_clip.json").read_text())["zero_shot_test_accuracy"]
    assert accuracy == pytest.approx(stated, abs=0.01)
    # Chance: 0.17, 0.14, 0.33, 0.002.
    assert accuracy["label"] > 0.95 and accuracy["colour"] > 0.95 and accuracy["time"] > 0.95
    assert accuracy["image_to_text_at_1"] > 0.6 and accuracy["text_to_image_at_1"] > 0.6


def test_captions_are_read_and_foreign_words_named(digits):
    codes = digits.embed_text(["a handwritten three", "a bold upright handwritten three"])
    assert codes.shape == (2, 32) and torch.allclose(codes.norm(dim=1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(codes[0], codes[1], atol=1e-2)
    with pytest.raises(UserError, match="does not know every word of 'a purple three'"):
        digits.embed_text(["a handwritten three", "a purple three"])


@pytest.mark.parametrize("shape", [(40, 60), (41, 60), (60, 43), (20, 20), (32, 32)])
def test_preprocessing_is_open_clips(shape):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    # Mid greys: Pillow clips between its two passes and we clip after both, which differs where the filter overshoots.
    pixels = torch.randint(64, 192, (*shape, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    given = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
    expected = image_transform_v2(PreprocessCfg(**given), is_train=False)(Image.fromarray(pixels.numpy()))
    ours = Preprocessing(**given | {"size": (32, 32)}, interpolation="bicubic", crop=True)
    found = ours((pixels.permute(2, 0, 1)[None] / 127.5 - 1).float())[0]
    # Pillow also rounds to 8 bits after each pass: a level and a half, seen through the smallest std.
    assert found.shape == expected.shape and (found - expected).abs().max() < 1.5 / 255 / 0.1


def test_a_configuration_and_a_checkpoint_make_the_model(digits, images, tmp_path):
    loaded = load_embedder(str(CONFIG), checkpoint=str(CHECKPOINT))
    assert torch.equal(loaded.embed(images[:4]), digits.embed(images[:4]))
    weights = load_file(CHECKPOINT)
    weights.pop("visual.proj")
    save_file(weights, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match=r"(?s)cannot load .*partial\.safetensors.*visual\.proj"):
        load_embedder(str(CONFIG), checkpoint=str(tmp_path / "partial.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot load .*broken\.safetensors"):
        load_embedder(str(CONFIG), checkpoint=str(tmp_path / "broken.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot read the embedder's configuration .*config\.json.*model_cfg"):
        load_embedder(str(tmp_path / "config.json"), checkpoint=str(CHECKPOINT))


def test_loading_leaves_the_global_random_numbers_alone():
    before = torch.random.get_rng_state()
    load_embedder("builtin:digits")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("ViT-B-32", None, None), "from pretrained or checkpoint, found neither"),
        (("ViT-B-32", "", None), "no weights '' for ViT-B-32"),
        (("ViT-B-32", "openai", "x.pt"), "checkpoint x.pt .* does not exist"),
        ((str(CONFIG), "openai", str(CHECKPOINT)), "leave out pretrained, found 'openai'"),
        (("hf-hub:nobody/nothing", "openai", None), "comes with its weights"),
        (("ViT-B-32", "opnai", None), "no weights 'opnai' for ViT-B-32; it has: openai"),
        (("ViT-B-33", "openai", None), "no model 'ViT-B-33'; did you mean"),
        (("ViT-B-32", None, "nowhere.pt"), "checkpoint nowhere.pt .* does not exist"),
        (
            ("builtin:digit", None, None),
            "no embedder 'builtin:digit'; there is builtin:digits, builtin:shapes, builtin:scenes",
        ),
        (("builtin:digits", "openai", None), "comes with its weights"),
    ],
)
def test_what_cannot_be_loaded_is_said(arguments, match):
    with pytest.raises(UserError, match=match):
        load_embedder(*arguments)


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
"""An architecture with weights that are drawn, for what does not depend on what they learned."""
PREPARED = {"mean": [0.1, 0.2, 0.3], "std": [0.6, 0.7, 0.8], "interpolation": "bilinear", "resize_mode": "squash"}


def random_tiny(folder):
    """The file of the weights of such a model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = embedders.build_model({"model_cfg": TINY})
    save_file(
        {name: x.contiguous() for name, x in network.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder / "open_clip_model.safetensors"


def assert_prepared(embedder):
    assert list(embedder.preprocess.mean) == PREPARED["mean"] and list(embedder.preprocess.std) == PREPARED["std"]
    assert (embedder.preprocess.interpolation, embedder.preprocess.crop) == ("bilinear", False)


def test_a_file_of_a_tags_weights_sees_pictures_as_the_tag_says(tmp_path, monkeypatch):
    import open_clip

    (tmp_path / "architecture").mkdir()
    (tmp_path / "architecture/random-tiny.json").write_text(json.dumps(TINY))
    weights = random_tiny(tmp_path)
    open_clip.add_model_config(tmp_path / "architecture")
    try:
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "random-tiny", {"ours": {"url": "", **PREPARED}})
        embedder = load_embedder("random-tiny", "ours", str(weights))
        assert_prepared(embedder)
        plain = load_embedder("random-tiny", None, str(weights))
        pictures = torch.rand(4, 3, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert (embedder.embed(pictures) * plain.embed(pictures)).sum(1).max() < 0.999
    finally:
        open_clip.factory._MODEL_CONFIGS.pop("random-tiny")


def test_a_model_of_the_hub_comes_with_its_weights_and_preparation(tmp_path, monkeypatch):
    """As the Hub's own cache has it once it was fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot get hf-hub:nobody/tiny: .*hf download nobody/tiny --local-dir FOLDER"):
        load_embedder("hf-hub:nobody/tiny")
    place = tmp_path / "models--nobody--tiny"
    revision = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(revision)
    (place / "snapshots" / revision).mkdir(parents=True)
    description = place / "snapshots" / revision / "open_clip_config.json"
    description.write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPARED}))
    weights = random_tiny(description.parent)
    embedder = load_embedder("hf-hub:nobody/tiny")
    assert_prepared(embedder)
    assert embedder.embed_text(["a boat"]).shape == (1, 16)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    from_files = load_embedder(str(description), checkpoint=str(weights))
    assert_prepared(from_files)
    torch.testing.assert_close(from_files.embed(pictures), embedder.embed(pictures))


def test_a_run_finds_its_files_from_anywhere_and_takes_them_along(tiny_config, tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(WEIGHTS, here / "own", ignore=lambda _, names: [n for n in names if not n.startswith("digits")])
    elsewhere.mkdir()
    own = '{ kind = "clip", dim = 32, source = "image", model = "own/digits_clip.json", '
    own += 'checkpoint = "own/digits_clip.safetensors" }'
    monkeypatch.chdir(here)
    asked = ["--out", "run", "--device", "cpu", "--set", "training.steps=1", f"modalities.clip={own}"]
    assert cli(["train", str(tiny_config), *asked]) == 0
    assert cli(["export", "run", "--out", str(tmp_path / "exported"), "--device", "cpu"]) == 0
    monkeypatch.chdir(elsewhere)
    asked = ["-n", "2", "--device", "cpu", "--observe", "clip=text: the number three"]
    assert cli(["sample", str(here / "run"), *asked, "--out", "samples"]) == 0
    shutil.rmtree(here)
    assert cli(["sample", str(tmp_path / "exported"), *asked, "--out", "again"]) == 0


def test_weights_that_cannot_be_had_are_no_random_network(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    # A small architecture with published weights, so that no time is lost on making it.
    with pytest.raises(UserError, match=r"cannot get the weights 'yfcc15m' of RN50: .*no route to host.*checkpoint"):
        load_embedder("RN50", "yfcc15m")


def test_the_activation_follows_the_weights(monkeypatch):
    """ViT-B-32 names an architecture with GELU, but OpenAI's weights for it were trained with QuickGELU."""
    seen = {}

    def create_model(name, **options):
        seen.update(options)
        raise RuntimeError("enough seen")

    monkeypatch.setattr("open_clip.create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(UserError, match="enough seen"):
            load_embedder("ViT-B-32", tag)
        assert seen["force_quick_gelu"] is quick and seen["require_pretrained"] is True


def test_the_loss_is_clips_where_each_caption_suits_one_image_and_spreads_where_more_do():
    from open_clip.loss import ClipLoss

    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    assert torch.allclose(contrastive_loss(image, text, scale, torch.eye(6) > 0), ClipLoss()(image, text, scale))
    # All captions suit all images: the best is not to tell them apart, at log B.
    same = text[:1].expand(6, 4)
    everything = torch.ones(6, 6) > 0
    assert contrastive_loss(image[:1].expand(6, 4), same, scale, everything).item() == pytest.approx(1.7918, abs=1e-4)


def short(name: str) -> Recipe:
    """A recipe over few samples."""
    recipe = RECIPES[name]
    return recipe if name == "digits" else evolve(recipe, data=evolve(recipe.data, count=200))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_repeats_itself_and_is_kept_without_loss(name, tmp_path, monkeypatch):
    recipe = short(name)
    (first, description), (again, _), (other, _) = (
        train(recipe, steps=4, batch=32, seed=seed, report=0) for seed in (0, 0, 1)
    )
    for key, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[key])
    size = recipe.vision["image_size"]
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not torch.equal(first.embed(images), other.embed(images))

    save(first, description, {"label": 0.5}, tmp_path / "new" / "clip", recipe.dtype)
    stem = tmp_path / "new" / "clip"
    assert all(weight.dtype == recipe.dtype for weight in load_file(stem.with_suffix(".safetensors")).values())
    loaded = load_embedder(str(stem.with_suffix(".json")), checkpoint=str(stem.with_suffix(".safetensors")))
    assert torch.equal(loaded.embed(images), first.embed(images))
    monkeypatch.setitem(embedders.BUILTIN, "builtin:new", stem)
    assert torch.equal(load_embedder("builtin:new").embed(images), first.embed(images))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_shipped_configuration_is_the_recipes(name):
    """The recipe must not drift from the weights that it is said to have made."""
    recipe = short(name)
    shipped = json.loads((WEIGHTS / f"{name}_clip.json").read_text())
    rows = recipe.captions(recipe.data.build("train"))
    stated = shipped.pop("zero_shot_test_accuracy")
    assert "label" in stated
    assert shipped == describe(recipe, [text for row in rows for text in row])
    weights = load_file(WEIGHTS / f"{name}_clip.safetensors")
    assert {weight.dtype for weight in weights.values()} == {recipe.dtype}


def test_the_digits_weights_are_what_they_were():
    """Results are made with them (in float32, of which these are the nearest in float16): another training is another
    model, and needs another name."""
    digest = hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert digest == "2d55e63e254a2fdeebc8d476927abfa4ec10ff0b518cc58337257726d5a9b1e6"


def test_a_scene_is_captioned_from_its_large_shapes_kind_to_everything():
    data = ShapesConfig(size=16, count=40).build("train")
    for whole, row in zip(data.fields["caption"], shapes_captions(data), strict=True):
        kind, placed, coloured, large, last = row
        place = next(place for place in sorted(PLACES, key=len, reverse=True) if placed.endswith(place))
        assert placed == f"{kind} {place}" and large == f"{coloured} {place}"
        assert last == whole and whole.startswith(large)
    # "a large red circle at the left" is one of a scene's own captions, "... at the top left" is not.
    assert shapes_captions(
        TensorDataset({"caption": ["a large red circle at the left and a small blue ring at the top"]})
    ) == [
        [
            "a large circle",
            "a large circle at the left",
            "a large red circle",
            "a large red circle at the left",
            "a large red circle at the left and a small blue ring at the top",
        ]
    ]


def test_pictures_are_shifted_by_as_much_as_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 5, 5, generator=generator) * 0.5
    assert torch.equal(augment(images, generator, 0, 0.0), images)
    moved = augment(images, generator, 1, 0.0)
    for before, after in zip(images, moved, strict=True):
        framed = torch.nn.functional.pad(before, (1, 1, 1, 1), value=-1.0)
        assert any(torch.equal(after, framed[:, y : y + 5, x : x + 5]) for y in range(3) for x in range(3))
    assert (moved != images).flatten(1).any(dim=1).float().mean() > 0.5  # 8 of 9 shifts move
    assert (augment(images, generator, 0, 0.1) - images).std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.long
def test_a_third_of_the_training_on_half_the_batch_is_far_above_chance():
    embedder, _ = train(RECIPES["digits"], steps=200, batch=64, report=0)
    assert evaluate_digits(embedder)["label"] > 0.4  # chance is 0.1; 0.6 was measured


def test_pictures_are_mirrored_whole():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 4, 6, generator=generator)
    seen = augment(images, generator, 0, 0.0, flip=True)
    same, mirrored = (seen == images).flatten(1).all(1), (seen == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 20 < mirrored.sum() < 44


OWN = """
[data]
kind = "{kind}"
{options}
[modalities.label]
kind = "label"
classes = {classes}
{names}
"""
NUMBERS = 'names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]'


def own(folder, kind, options="", classes=10, names=NUMBERS):
    path = folder / "own.toml"
    path.write_text(OWN.format(kind=kind, options=options, classes=classes, names=names))
    return path


@pytest.mark.long
def test_an_embedder_of_ones_own_classes_is_trained_by_a_command_and_used(tmp_path, capsys):
    config = own(tmp_path, "digits")
    assert main([str(config), "--text", "label", "--out", str(tmp_path / "made"), "--steps", "100"]) == 0
    said = capsys.readouterr().out
    stem = tmp_path / "made" / "own_clip"
    assert f'model = "{stem}.json"' in said and f'checkpoint = "{stem}.safetensors"' in said and "dim = 64" in said
    assert json.loads(stem.with_suffix(".json").read_text())["zero_shot_test_accuracy"]["class"] > 0.2  # chance is 0.1
    embedder = load_embedder(f"{stem}.json", checkpoint=f"{stem}.safetensors")
    assert embedder.embed_text(["a picture of seven"]).shape == (1, 64)


def test_an_embedder_of_ones_own_captions_knows_words_that_they_do_not_have(tmp_path):
    recipe = recipe_of(own(tmp_path, "shapes", "size = 16\ncount = 64"), Registry.discover())
    embedder, description = train(recipe, steps=2, batch=8, report=0)
    assert "vocabulary" not in description and not recipe.flip
    assert embedder.embed_text(["a purple cat"]).shape == (1, 64)
    assert set(recipe.evaluate(embedder)) == {"image_to_text_at_1", "image_to_text_at_5"}


def test_what_an_embedder_cannot_be_trained_on_is_said(tmp_path, capsys):
    def refused(config, *options):
        assert main([str(config), "--out", str(tmp_path / "none"), *options]) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "no such file" in refused(tmp_path / "none.toml")
    assert "samples with a field 'sound', found" in refused(own(tmp_path, "digits"), "--text", "sound")
    assert "pictures in the field 'label'" in refused(own(tmp_path, "digits"), "--image", "label")
    nameless = own(tmp_path, "digits", names="")
    assert "no modality says what they are called; give the modality 'label' names" in refused(
        nameless, "--text", "label"
    )
    (tmp_path / "own.toml").write_text("steps = 3\n")
    assert "expected a table [data]" in refused(tmp_path / "own.toml")
