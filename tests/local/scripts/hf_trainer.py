"""A Trainer script as transformers' own examples are written: all settings come from TrainingArguments."""

import os
import sys

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


class Numbers(torch.utils.data.Dataset):
    """Sequences that count upwards."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = (torch.arange(16) + index) % 64
        return {"input_ids": ids, "labels": ids}


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=Numbers())
    trainer.train()
    trainer.save_state()
    # PyTorch 2.13 sometimes aborts at exit while it frees gloo's threads. All ranks are done here, so end without that.
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
