"""LPIPS is the package's own value with the weights it is given, and nothing without weights."""

from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch
import torchvision

from mtdiffusion_plugins.metrics.lpips import LpipsConfig
from mtdiffusion_registry import UserError


@pytest.fixture(scope="module")
def stand_in_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of torchvision's weights, of a random network: enough to see that they are loaded."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet-random.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_is_the_package_s_distance_with_the_weights_of_the_file(stand_in_weights: Path) -> None:
    a, b = pictures(0), pictures(1)
    evaluator = LpipsConfig(net="squeeze", weights=str(stand_in_weights)).build({"image": a})
    trunk = torchvision.models.squeezenet1_1(weights=None)
    trunk.load_state_dict(torch.load(stand_in_weights, weights_only=True))
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    for layer, block in reference.net.named_modules():
        if layer.startswith("slice") and layer.count(".") == 1:
            block.load_state_dict(trunk.features[int(layer.split(".")[1])].state_dict())
    with torch.no_grad():
        expected = reference(a, b).mean().item()
    measured = evaluator.conditional("image", {"image": a}, {"image": b})
    assert measured == {"lpips_squeeze": pytest.approx(expected, rel=1e-5)}
    assert evaluator.conditional("image", {"image": a}, {"image": a})["lpips_squeeze"] == pytest.approx(0, abs=1e-7)
    assert evaluator.conditional("label", {}, {}) == {}


def test_small_grey_pictures_are_enlarged(stand_in_weights: Path) -> None:
    small = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    evaluator = LpipsConfig(net="squeeze", weights=str(stand_in_weights)).build({"image": small})
    assert evaluator.conditional("image", {"image": small}, {"image": -small})["lpips_squeeze"] > 0


def test_without_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"weights of 'alex' cannot be downloaded .* set weights to its path"):
        LpipsConfig().build({"image": pictures(0)})


def test_weights_of_another_network_are_refused(stand_in_weights: Path, tmp_path: Path) -> None:
    train = {"image": pictures(0)}
    with pytest.raises(UserError, match=r"squeezenet-random\.pth: not torchvision's weights of 'alex'"):
        LpipsConfig(weights=str(stand_in_weights)).build(train)
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        LpipsConfig(weights=str(tmp_path / "none.pth")).build(train)
    with pytest.raises(UserError, match=r"'label' is no modality of pictures; there are image"):
        LpipsConfig(input="label").build(train)
