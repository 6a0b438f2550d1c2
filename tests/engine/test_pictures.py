"""Sheets of pictures, judged by known colours at known places."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine import gallery, pictures
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.pictures import (
    LARGEST,
    SMALL,
    Block,
    Legend,
    Row,
    draw_blocks,
    read_visibility,
    sample_sheet,
    tile,
    tile_size,
    to_image,
    visibility_of,
)
from mtdiffusion_engine.samples import Samples
from mtdiffusion_registry import UserError
from tests.engine.tiny import toy

RED, GREEN, LIME, PINK = (255, 0, 0), (0, 128, 0), (0, 255, 0), (255, 0, 255)
Colour = tuple[int, int, int]
Spot = tuple[int, int, int, int]


def plain(colour: Colour, height: int = 8, width: int = 8, n: int = 1) -> Tensor:
    """Pictures ``[n, 3, height, width]`` of one colour."""
    return (torch.tensor(colour) / 255)[None, :, None, None].expand(n, 3, height, width)


def where(page: Image.Image, colour: Colour) -> NDArray[np.bool_]:
    return np.asarray((np.array(page) == colour).all(2))


def spot(page: Image.Image, colour: Colour) -> Spot:
    """Top, left, height and width of the area that a colour is in, and that it fills."""
    found = where(page, colour)
    rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
    assert len(rows), "this colour is nowhere"
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    assert found.sum() == height * width
    return int(rows[0]), int(columns[0]), height, width


# --- tiles ------------------------------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    picture = torch.rand(3, 8, 4)
    expected = (picture * 255).round().to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert tile_size(8, 4) == (64, 32)
    assert torch.equal(torch.from_numpy(np.array(tile(picture, (64, 32)))).permute(2, 0, 1), expected)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((8, 8), (64, 64)),
        ((23, 23), (69, 69)),
        ((64, 64), (64, 64)),
        ((120, 160), (120, 160)),
        ((480, 640), (120, 160)),
        ((400, 200), (160, 80)),
        ((1, 5000), (1, 160)),
    ],
)
def test_tiles_keep_the_shape_of_pictures(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert tile_size(*size) == shown
    assert SMALL <= max(shown) <= LARGEST


def test_scenes_have_larger_tiles_than_words_unless_they_are_tiny() -> None:
    for size, as_word, as_scene in (((48, 64), (48, 64), (96, 128)), ((8, 8), (64, 64), (64, 64))):
        word = Row("x", torch.zeros(1, 3, *size))
        assert (word.tile, evolve(word, scene=True).tile) == (as_word, as_scene)


def test_classes_stay_pure_where_photographs_are_filtered() -> None:
    stripes = torch.zeros(3, 300, 300)
    stripes[:, :, ::3] = 1
    assert set(np.unique(np.array(tile(stripes, (160, 160))))) == {0, 255}
    noise = torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))
    assert np.array(tile(noise, (30, 30))).std() < 30  # one pixel in a hundred would have 74


def test_holes_are_hatched_where_they_are() -> None:
    visible = torch.ones(4, 4)
    visible[1, 2] = 0
    pixels = np.array(tile(plain(RED)[0], (64, 64), visible))
    hidden = (pixels != RED).any(2)
    expected = np.zeros((64, 64), dtype=bool)
    expected[16:32, 32:48] = True
    assert (hidden == expected).all()
    assert len(np.unique(pixels[hidden], axis=0)) == 2


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_has_a_row_a_name_and_marks_what_is_given() -> None:
    def page(kind: pictures.Kind) -> Image.Image:
        rows = [Row("a", plain(GREEN, n=3)), Row("b", plain(RED, 32, 48), kind)]
        return draw_blocks("page", [Block("block", rows)])

    generated, given = np.array(page("generated")), np.array(page("given"))
    assert generated.shape == given.shape
    top, left, height, width = spot(page("given"), RED)
    assert (height, width) == (64, 96)
    frame = np.array([given[top - 3, left + 40], given[top + height + 2, left + 40], given[top + 30, left - 3]])
    assert (frame == frame[0]).all() and (frame[0] != 255).any()
    differs = np.nonzero((generated != given).any((1, 2)))[0]
    assert top - 5 < differs.min() and differs.max() < top + height + 4  # the second row alone
    assert (generated[top - 3, left + 40] == 255).all()


def test_what_belongs_to_one_sample_stands_in_one_column() -> None:
    small = torch.cat([plain(RED), plain(LIME)])
    page = draw_blocks("page", [Block("", [Row("a", plain(GREEN, 100, 150, 2)), Row("b", small)])])
    _, _, _, width = spot(page, RED)
    columns = where(page, GREEN).any(0).nonzero()[0]
    first = columns[0]
    assert columns[-1] - first + 1 == 2 * 150 + 4
    for colour, offset in ((RED, 0), (LIME, 154)):
        assert spot(page, colour)[1] == first + offset + (150 - width) // 2


def test_the_truth_is_directly_below_what_is_generated_on_a_band_of_its_own() -> None:
    rows = [Row("a", plain(GREEN)), Row("b", plain(RED)), Row("b", plain(LIME), "truth"), Row("c", plain(PINK))]
    page = draw_blocks("page", [Block("", rows)])
    tops = [spot(page, colour)[0] for colour in (GREEN, RED, LIME, PINK)]
    steps = np.diff(tops) - 64
    assert steps[0] == steps[2] > 2 * steps[1] > 0
    beside = [page.getpixel((page.width - 30, top + 32)) for top in tops]
    assert [colour == (255, 255, 255) for colour in beside] == [True, True, False, True]


def test_a_sample_that_lacks_a_modality_has_an_empty_tile_with_a_dash() -> None:
    row = Row("a", plain(RED, n=3), present=torch.tensor([True, False, True]))
    page = draw_blocks("page", [Block("", [row])])
    found = where(page, RED)
    assert found.sum() == 2 * 64 * 64
    top, left = (int(found.any(axis).nonzero()[0][0]) for axis in (1, 0))
    empty = np.array(page)[top : top + 64, left + 68 : left + 132]
    inked = (empty[2:-2, 2:-2] != 255).any(2)
    rows, columns = inked.any(1).nonzero()[0], inked.any(0).nonzero()[0]
    assert inked.any() and abs(rows.mean() - 30) < 2 and abs(columns.mean() - 30) < 2
    assert np.ptp(rows) < 4 < np.ptp(columns)


# --- legends ----------------------------------------------------------------------------------------------------------


def legend_page(legend: Legend, shown: str = "mask") -> Image.Image:
    return draw_blocks("page", [Block("block", [Row(shown, plain((9, 9, 9), n=6))])], {"mask": legend})


def swatch(page: Image.Image, colour: Colour) -> tuple[int, int]:
    """Top and left of a legend's swatch."""
    top, left, height, width = spot(page, colour)
    assert height == width == 13
    return top, left


def test_a_legend_has_a_swatch_a_name_once_a_sheet() -> None:
    page = legend_page([("road", RED), ("sky", LIME)])
    (top, left), (also, right) = swatch(page, RED), swatch(page, LIME)
    assert top == also
    between = np.array(page)[top : top + 13, left + 14 : right - 2]
    assert (between < 100).all(2).any()  # the name
    assert where(page, (9, 9, 9)).any(1).nonzero()[0][0] > top + 20  # above the pictures
    assert not where(legend_page([("road", RED)], shown="other"), RED).any()
    assert legend_page([]).height < page.height


def test_long_legends_are_wrapped_and_long_names_cut() -> None:
    colours = [(200, 10 + 15 * i, 77) for i in range(14)]
    page = legend_page([("a name " * 20, colour) for colour in colours])
    places = [swatch(page, colour) for colour in colours]
    lines = sorted({top for top, _ in places})
    assert len(lines) > 3 and len(set(np.diff(lines))) == 1 and np.diff(lines)[0] > 14
    assert places == sorted(places) and min(left for _, left in places) == places[0][1]
    margin = np.array(page)[lines[0] : lines[-1] + 14, -12:]
    assert (margin == 255).all()


def test_modalities_with_one_legend_share_it() -> None:
    rows = [Row("mask", plain((9, 9, 9))), Row("more", plain((9, 9, 9)))]
    page = draw_blocks("page", [Block("", rows)], {name: [("road", RED)] for name in ("mask", "more")})
    swatch(page, RED)


def test_titles_that_are_too_long_are_cut_and_subtitles_wrapped() -> None:
    blocks = [Block("block " * 40, [Row("a rather long name of a modality", plain(RED))])]
    page, short = (draw_blocks("page " * n, blocks, subtitle="words " * n) for n in (60, 1))
    assert page.width == short.width and page.height > short.height
    assert (np.array(page)[:, -10:] == 255).all()
    assert spot(page, RED)[1] < 190


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> MultimodalDiffusion:
    return build_model(toy('modalities.mask.names=["ground","thing"]'))


def values(n: int, grey: int = 0) -> dict[str, Tensor]:
    """Images of one grey, masks of the class 1 and labels."""
    image = torch.full((n, 1, 4, 4), grey / 127.5 - 1)
    return {"image": image, "mask": torch.ones(n, 4, 4, dtype=torch.int64), "label": torch.arange(n) % 3}


GREY = (77, 77, 77)


@pytest.mark.parametrize(("n", "drawn", "lines"), [(5, 5, 1), (40, 40, 3), (70, 64, 4)])
def test_samples_stand_in_lines_of_sixteen(model: MultimodalDiffusion, n: int, drawn: int, lines: int) -> None:
    found = where(sample_sheet(model, values(n, 77)), GREY)
    assert found.sum() == drawn * 64 * 64
    assert found.any(1).sum() == lines * 64 and found.any(0).sum() == min(n, 16) * 64


def test_a_sheet_says_how_many_more_there_are(model: MultimodalDiffusion) -> None:
    all_drawn, first = (np.array(sample_sheet(model, values(n))) for n in (64, 70))
    differs = (all_drawn != first).any((1, 2)).nonzero()[0]
    assert len(differs) and differs.max() < 80  # the heading alone


def test_what_is_given_is_above_with_its_holes(model: MultimodalDiffusion) -> None:
    visible = torch.ones(4, 4)
    visible[:2] = 0
    samples = values(3, 77)
    made = {**samples, "image": torch.full((3, 1, 4, 4), 200 / 127.5 - 1)}
    page = sample_sheet(model, made, observed={"image": samples["image"][0]}, visible={"image": visible})
    seen, filled = where(page, GREY), where(page, (200, 200, 200))
    assert seen.sum() == 3 * 64 * 32 and filled.sum() == 3 * 64 * 64
    top = int(seen.any(1).nonzero()[0][0])
    assert top < filled.any(1).nonzero()[0][0]
    left = int(seen.any(0).nonzero()[0][0])
    hole = np.array(page)[top - 32 : top, left : left + 64].reshape(-1, 3)
    assert len(np.unique(hole, axis=0)) == 2 and hole.min() > 100


def test_a_modality_given_whole_is_drawn_once(model: MultimodalDiffusion) -> None:
    samples = values(2, 77)
    page = sample_sheet(model, samples, observed={"image": samples["image"]})
    assert where(page, GREY).sum() == 2 * 64 * 64
    page = sample_sheet(model, samples, observed={"image": samples["image"]}, strength={"image": 0.5})
    assert where(page, GREY).sum() == 4 * 64 * 64  # what it started from, and what became of it


def test_words_say_what_was_given(model: MultimodalDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(pictures, "draw_blocks", lambda *asked: told.append(asked[3]))
    x = values(70)
    sample_sheet(model, x)
    sample_sheet(model, x, observed={"label": x["label"][0], "mask": x["mask"]}, values={"label": "horse"})
    sample_sheet(
        model,
        {name: each[:2] for name, each in x.items()},
        observed={"image": x["image"], "mask": x["mask"]},
        visible={"image": torch.ones(4, 4)},
        strength={"mask": 0.4},
        values={"mask": f"{'m' * 90}.png"},
    )
    sample_sheet(model, {name: each[:2] for name, each in x.items()}, first=64, total=70)
    assert told == [
        "everything generated together; first 64 of 70",
        "given mask, label=horse; first 64 of 70",
        f"given image with holes; started from mask={'m' * 79}… at strength 0.4",
        "everything generated together; 0064 to 0065 of 70",
    ]


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_the_gallery_shows_the_truth_below_what_is_read_off(
    model: MultimodalDiffusion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = torch.ones(3, dtype=torch.bool)
    lacking = there.clone()
    lacking[1] = False
    drawn = [
        Samples(values(3), {"image": there, "mask": lacking, "label": there}),
        Samples(values(3), {"image": there, "mask": there, "label": ~there}),
        Samples(values(3), {"image": there, "mask": there, "label": there}),
    ]
    monkeypatch.setattr(gallery, "held_out", lambda run: None)
    monkeypatch.setattr(gallery, "draw_samples", lambda data, wishes, seed: drawn)
    blocks: dict[str, list[Row]] = {}
    draw = gallery.draw_blocks

    def note(title: str, made: list[Block], *more: object) -> Image.Image:
        blocks.update((block.title, list(block.rows)) for block in made)
        return draw(title, made, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(gallery, "draw_blocks", note)
    run = SimpleNamespace(model=model, experiment=toy())
    page = Image.open(gallery.draw_gallery(run, tmp_path / "gallery.png", columns=3))  # type: ignore[arg-type]
    assert page.width > 3 * 64

    def kinds(title: str) -> list[tuple[str, str]]:
        return [(row.name, row.role or row.kind) for row in blocks[title]]

    assert kinds("everything generated together") == [(name, "generated") for name in ("image", "mask", "label")]
    truths = [("label", "generated"), ("label", "truth")]
    assert kinds("given only this image") == [("image", "given"), ("mask", "generated"), ("mask", "truth"), *truths]
    mask = blocks["given only this image"][2]
    assert mask.present is not None and mask.present.tolist() == [True, False, True]
    # No sample that was drawn with a mask has a label: there is no truth to show.
    assert kinds("given only this mask")[-2:] == [("image", "truth"), ("label", "generated")]
    holes = blocks["given only this image with holes"]
    assert [(row.role, row.kind) for row in holes] == [("seen", "given"), ("filled", "generated"), ("truth", "truth")]
    assert holes[0].visible is not None and holes[0].visible.shape == (3, 4, 4)


# --- visibility maps --------------------------------------------------------------------------------------------------


def test_a_visibility_map_is_white_where_it_is_seen(tmp_path: Path) -> None:
    visible = (torch.rand(5, 7) > 0.5).float()
    path = tmp_path / "map.png"
    to_image(visible.expand(3, -1, -1)).save(path)
    assert torch.equal(read_visibility(path), visible)
    large = visible.repeat_interleave(3, 0).repeat_interleave(3, 1)
    to_image(large.expand(3, -1, -1)).save(path)
    assert torch.equal(read_visibility(path, (5, 7)), visible)
    with Image.open(path) as picture:
        assert torch.equal(visibility_of(picture, (5, 7)), visible)
        with pytest.raises(UserError, match="a picture of what is visible: expected 7 × 5 pixels, found 21 × 15"):
            visibility_of(picture, (5, 7), resize=False)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"map\.png: cannot be read as a picture"):
        read_visibility(path)
    with pytest.raises(UserError, match="no such file"):
        read_visibility(tmp_path / "none.png")


def test_a_visibility_map_is_a_tensor_a_picture_or_its_file(tmp_path: Path) -> None:
    visible = (torch.rand(5, 7) > 0.5).float()
    picture = to_image(visible.expand(3, -1, -1))
    picture.save(tmp_path / "map.png")
    for value in (visible, visible.bool().numpy(), picture, tmp_path / "map.png", str(tmp_path / "map.png")):
        assert torch.equal(visibility_of(value), visible)


def test_a_map_of_what_is_visible_is_white_where_it_is_seen(tmp_path: Path) -> None:
    seen = np.array([[1, 0], [1, 1]], np.uint8)
    for name, image in (("a.png", seen * np.uint8(255)), ("b.png", seen > 0), ("c.tif", seen * np.uint16(65535))):
        Image.fromarray(image).save(tmp_path / name)
        assert read_visibility(tmp_path / name).tolist() == seen.tolist()
        assert visibility_of(Image.open(tmp_path / name)).tolist() == seen.tolist()
    Image.fromarray(seen * np.uint8(0)).save(tmp_path / "none.png")
    assert not read_visibility(tmp_path / "none.png").any()
    Image.fromarray(seen).save(tmp_path / "ones.png")  # 0 and 1, as arrays of booleans are often saved
    with pytest.raises(UserError, match=r"ones\.png: nothing in it is white, its lightest grey is 1 of 255"):
        read_visibility(tmp_path / "ones.png")
