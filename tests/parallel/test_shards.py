"""Windows of sharded parameters: uneven, empty, and cut twice along one dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.training import model_config, parallel_model
from triptych.models.config import LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.parallel.shards import ShardInfo

Distributed = Callable[..., list[Any]]


def shards_of(config: LanguageConfig, parallel: ParallelConfig) -> tuple[dict[str, ShardInfo], bool]:
    model = parallel_model(config, parallel, micro_batch_size=1)
    shards = {shard.name: shard for shard in model.shards()}
    parameters = dict(model.named_parameters())
    # A shard is a window on the parameter itself: what is written to one is read from the other.
    for name, shard in shards.items():
        shard.tensor.fill_(dist.get_rank() + 1)
        local = parameters[name].to_local() if hasattr(parameters[name], "to_local") else parameters[name]
        if not bool((local == dist.get_rank() + 1).all()):
            return shards, False
    return shards, True


def test_windows_tile_the_whole(distributed: Distributed) -> None:
    parallel = ParallelConfig(tp=2, dp_shard=3, dp_replicate=1)
    results = distributed(6, shards_of, model_config(vocab_size=20), parallel)
    assert all(shares for _, shares in results)
    for name, first in results[0][0].items():
        times = torch.zeros(first.global_shape)
        for shards, _ in results:
            shard = shards[name]
            box = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape))
            times[box] += float(shard.is_writer)
        assert bool((times == 1).all()), f"{name} is not written exactly once everywhere"
    # 20 rows over tp 2 are 10, over dp_shard 3 then 4, 4 and 2.
    offsets = [shards["embedding.weight"].offset[0] for shards, _ in results]
    assert offsets == [0, 10, 4, 14, 8, 18]


def test_ranks_beyond_a_short_tensor_hold_nothing(distributed: Distributed) -> None:
    parallel = ParallelConfig(dp_shard=3)
    config = model_config(attention={"qk_norm": True, "head_dim": 4})
    results = distributed(3, shards_of, config, parallel)
    # 4 channels over 3 ranks: 2, 2 and none.
    sizes = [shards["blocks.1.mixer.q_norm.weight"].tensor.numel() for shards, _ in results]
    assert sizes == [2, 2, 0]
