"""The process of one rank: model, data, training loop, checkpoints, checks between ranks."""
