"""Text from a checkpoint that another layout wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.data_pipeline import train_tokenizer
from triptych.tools.sample import sample


def test_continues_each_prompt(trained_run: Any) -> None:
    prompts = ["word1 and", "", "text 3: más"]
    texts = sample(trained_run.run_dir, prompts=prompts, max_new_tokens=8)
    assert len(texts) == 3
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts))
    assert any(len(text) > len(prompt) for text, prompt in zip(texts, prompts))


def test_is_a_function_of_the_seed_and_of_its_own_prompt(trained_run: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5}
    first = sample(trained_run.run_dir, prompts=["word1"], seed=1, **options)
    assert sample(trained_run.run_dir, prompts=["other", "word1"], seed=1, **options)[1:] == first
    assert sample(trained_run.run_dir, prompts=["word1"], seed=2, **options) != first


def test_takes_one_checkpoint_and_greedy_needs_no_seed(trained_run: Any) -> None:
    checkpoint = trained_run.run_dir / "checkpoints" / "step-00000006"
    options: dict[str, Any] = {"prompts": ["word1"], "max_new_tokens": 4, "temperature": 0.0}
    assert sample(checkpoint, seed=1, **options) == sample(trained_run.run_dir, seed=2, **options)


def test_errors(trained_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint"):
        sample(tmp_path, prompts=["a"])
    with pytest.raises(ValueError, match=r"tokenizer .*nothing\.json cannot be read"):
        sample(trained_run.run_dir, prompts=["a"], tokenizer=tmp_path / "nothing.json")
    larger = tmp_path / "larger.json"
    larger.write_text(train_tokenizer([" ".join(str(n * n) for n in range(999))], 330).text)
    with pytest.raises(ValueError, match=r"ids but the model 300"):
        sample(trained_run.run_dir, prompts=["a"], tokenizer=larger)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(trained_run: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA device"):
        sample(trained_run.run_dir, prompts=["a"], device="cuda")
