"""The process of one rank: model, data, train loop, checkpoints, agreement between ranks."""
