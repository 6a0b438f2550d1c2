import itertools
from pathlib import Path

import pytest
import torch
from mtdiffusion_tokens import TokensConfig, TokensModality, cosines
from torch import Tensor

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_registry import Registry
from mtdiffusion_registry.testing import check_modality

CONFIG = TokensConfig(length=3, vocabulary=("three", "dark", "strokes"))


def every_caption() -> Tensor:
    rows = itertools.product(range(4), repeat=3)
    return torch.tensor([row for row in rows if all(b == 0 or a > 0 for a, b in itertools.pairwise(row))])


def build(config: TokensConfig = CONFIG) -> TokensModality:
    modality = config.build(LatentSpec(config.latent_channels(4, 4), 4, 4), FeatureSpec(8, 4, 4, 16))
    assert isinstance(modality, TokensModality)
    return modality


def logits(seed: int = 0) -> dict[str, Tensor]:
    return {"logits": 1.5 * torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def probabilities(params: dict[str, Tensor]) -> Tensor:
    x = every_caption()
    return torch.exp(-build().decoder.nll({"logits": params["logits"].expand(len(x), -1, -1)}, x))


def test_contract() -> None:
    words = tuple(f"w{i}" for i in range(13))
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(1, 14, (24, 4), generator=draw)
    x[torch.arange(4) >= torch.randint(0, 5, (24, 1), generator=draw)] = 0
    check_modality(TokensConfig(length=4, vocabulary=words), examples=x)


def test_it_is_installed() -> None:
    assert Registry.discover().config_class("modality", "tokens").kind == "tokens"


def test_the_likelihood_sums_to_one_over_captions_of_every_length() -> None:
    assert len(every_caption()) == 1 + 3 + 9 + 27
    assert probabilities(logits()).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_the_mode_is_the_most_likely_caption(seed: int) -> None:
    params = logits(seed)
    expected = every_caption()[probabilities(params).argmax()]
    assert torch.equal(build().decoder.mode(params)[0], expected)


def test_the_expected_code_is_exact() -> None:
    modality, params = build().double(), logits()
    codes = modality.encoder(every_caption())
    mean = (probabilities(params).reshape(-1, 1, 1, 1) * codes).sum(0)
    assert torch.allclose(modality.decoder.expected_encoding(params, modality.encoder)[0], mean, atol=1e-6)


def test_samples_follow_the_distribution() -> None:
    params = {"logits": logits()["logits"].expand(20_000, -1, -1)}
    x = build().decoder.sample(params, torch.Generator().manual_seed(0))
    build().check(x)
    share = (x[:, None] == every_caption()).all(2).double().mean(0)
    assert (share - probabilities(logits())).abs().max() < 0.01


def test_codes_are_orthogonal_and_the_readout_finds_them() -> None:
    gram = cosines(14, 16).double() @ cosines(14, 16).double().T / 16
    assert torch.allclose(gram, torch.eye(14, dtype=torch.float64), atol=1e-6)
    encoder, x = build().encoder, every_caption()
    read = encoder.readout(encoder(x)).unflatten(1, (3, 4))
    assert torch.allclose(read, torch.nn.functional.one_hot(x, 4).float(), atol=1e-5)


def test_what_follows_the_end_counts_for_nothing() -> None:
    decoder, params = build().decoder, logits()
    moved = params["logits"].clone()
    moved[:, 2] += torch.tensor([0.0, 5.0, -5.0, 1.0])
    x = torch.tensor([[2, 0, 0]])
    assert torch.equal(decoder.nll(params, x), decoder.nll({"logits": moved}, x))


def test_metrics_count_words_and_length() -> None:
    found = build().metrics(torch.tensor([[1, 2, 3], [1, 0, 0]]), torch.tensor([[1, 2, 0], [1, 0, 0]]))
    assert found == pytest.approx({"token_accuracy": 3 / 4, "exact_match": 1 / 2})
    assert set(found) == set(TokensModality.metric_directions)


def test_text_and_files(tmp_path: Path) -> None:
    modality = build()
    assert modality.parse("three dark strokes").tolist() == [1, 2, 3]
    assert modality.parse("three").tolist() == [1, 0, 0]
    path = modality.write(torch.tensor([1, 2, 0]), tmp_path, "a")
    assert path.read_text() == "three dark\n"
    assert modality.parse(str(path)).tolist() == [1, 2, 0]
    pictures = modality.render(every_caption())
    assert len(pictures.flatten(1).unique(dim=0)) == len(pictures)


@pytest.mark.parametrize(
    ("text", "said"),
    [("three darc", "did you mean 'dark'"), ("three three three three", "at most 3"), ("no.txt", "no.txt")],
)
def test_bad_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build().parse(text)


@pytest.mark.parametrize(
    ("x", "said"),
    [([[1, 0, 1]], "after a 0"), ([[4, 0, 0]], "0 to 4"), ([[1, 0]], "batch, 3"), ([[1.0, 0.0, 0.0]], "int64")],
)
def test_bad_tokens_are_refused(x: list[list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build().check(torch.tensor(x))


@pytest.mark.parametrize("words", [("a", "a"), ("two words",), ()])
def test_bad_vocabularies_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        TokensConfig(length=3, vocabulary=words)


def test_a_caption_too_long_for_the_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit the 4 places"):
        TokensConfig(length=5, vocabulary=("a",)).latent_channels(2, 2)
