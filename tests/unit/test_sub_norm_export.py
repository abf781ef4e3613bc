"""A SubLN that came in with λ leaves as an ordinary one, or, before the transition, not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitscale.checkpoint import Reader
from bitscale.config import Config
from bitscale.convert import load_model, open_source
from bitscale.convert.clients import decoder_logits
from bitscale.convert.formats import export
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from tiny_models import VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
IDS_BS = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))
MODEL = "model={sub_norm: transition, tie_embeddings: true}"


@pytest.mark.parametrize("strength", [SIXTEEN_BIT, TERNARY], ids=["before", "after"])
def test_the_exported_model_is_the_trained_one(
    strength: Strength, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = make_checkpoint(make_config, tmp_path / "trained", MODEL, strength=strength)
    source = open_source(path)
    assert source.model.sub_norm is (strength == TERNARY)
    assert any("sub_norm" in name for name in Reader(path).meta.shapes)
    assert any("sub_norm" in name for name in source.shapes) == (strength == TERNARY)
    trained = load_model(path).model
    with torch.no_grad():
        expected = trained.logits(IDS_BS)
    assert torch.equal(decoder_logits(source, strength)(IDS_BS), expected)
    other = TERNARY if strength == SIXTEEN_BIT else SIXTEEN_BIT
    assert not torch.equal(decoder_logits(source, other)(IDS_BS), expected)


def test_inside_the_ramp_no_client_computes_it(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_checkpoint(make_config, tmp_path / "trained", MODEL, strength=Strength(0.5, 0.5, 0))
    for target in ("hf", "gguf-f16"):
        with pytest.raises(CheckpointError, match="a SubLN that is still coming in"):
            export(open_source(path), tmp_path / target, target)  # type: ignore[arg-type]
        assert not (tmp_path / target).exists()
