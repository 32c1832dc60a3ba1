import pytest
import torch

from tests.models.common import random_tokens, small_config, small_model
from triptych.models.dropout import Dropout, salt_dropouts

KEYS = torch.tensor([11, 22, 33])


def test_share_scale_and_identity_in_evaluation():
    dropout = Dropout(0.25, cut="sequence")
    x = torch.ones(3, 50, 40, dtype=torch.float64)
    y = dropout(x, KEYS)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropout.eval()(x, None) is x


def test_training_needs_keys():
    with pytest.raises(ValueError, match=r"dropout=0.1 in training needs sample_keys"):
        Dropout(0.1, cut="sequence")(torch.ones(1, 2, 3), None)


def test_shards_see_their_part_of_the_mask():
    x = torch.ones(3, 12, 5)
    whole = Dropout(0.5, cut="sequence")(x, KEYS)
    for rank in range(3):
        part = Dropout(0.5, cut="sequence")
        part.shard_rank, part.shard_count = rank, 3
        assert torch.equal(part(x[:, :4], KEYS), whole[:, 4 * rank : 4 * rank + 4])


def test_modules_and_samples_differ():
    model = torch.nn.ModuleDict({"a": Dropout(0.5, "sequence"), "b": Dropout(0.5, "sequence")})
    salt_dropouts(model)
    x = torch.ones(3, 10, 40)
    a, b = model["a"](x, KEYS), model["b"](x, KEYS)
    for one, other in [(a, b), (a[0], a[1]), (a[1], a[2])]:
        assert 0.3 < (one == other).float().mean() < 0.7


def test_a_training_pass_is_a_function_of_the_samples_not_of_the_batch():
    config = small_config(dropout=0.3, attention={"num_heads": 4, "head_dim": 8, "dropout": 0.2})
    model = small_model(config).train()
    tokens = random_tokens(config, 3, 9)
    together = model(tokens, sample_keys=KEYS)
    assert torch.equal(together, model(tokens, sample_keys=KEYS))
    alone = torch.cat([model(tokens[i : i + 1], sample_keys=KEYS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(together, model(tokens, sample_keys=KEYS + 1))
