"""The quick start's own job file: a real pretrained model on real text, for a few updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.run_dir import RunDir
from tests.local.launcher_commands import Command, run_folder

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/.data/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not MODEL.exists(), reason="`make test` fetches the model with examples/fetch_quickstart.py")
def test_the_quick_start_lowers_the_loss_and_its_model_still_answers(tmp_path, forked):
    # The command runs where the test may write; the job's own paths are relative to the checkout.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    overrides = [
        "train.max_steps=2",
        "train.train_micro_batch_size_per_gpu=2",
        "data.max_length=48",
        "data.eval=0.03",
        "schedule.warmup=1",
        # It would be 1.5 GB of Adam's moments; other tests save checkpoints.
        "checkpoint.save_final=false",
    ]
    command = Command("run", str(ROOT / "examples/quickstart.yaml"), *overrides, folder=tmp_path, **forked)
    assert command.wait() == 0, command.output
    run = RunDir(run_folder(tmp_path))
    before, after = run.evaluations()
    assert after["loss"] < before["loss"] < 4.5
    assert "finished after 2 updates" in command.output

    tokenizer = AutoTokenizer.from_pretrained(run.export)
    model = AutoModelForCausalLM.from_pretrained(run.export, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :])
