"""Packed sequences have the loss and gradients of single ones, and models for which they would not are found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher import document_attention
from launcher.chunked_loss import LossLayer
from launcher.errors import FailureCode, RunFailed
from launcher.plan.schema import Plan
from launcher.prepare.packing_probe import flash_imitation, using_attention
from launcher.prepare.small_model_probe import probe_small_model
from launcher.token_store import TokenStore, TokenWriter
from launcher.worker.batches import IGNORED, BinOrder, SampleOrder, Share, collate, collate_row, micro_batches, order_of
from launcher.worker.evaluate import evaluate
from launcher.worker.loss import summed_loss
from tests.unit.inputs import data_facts, job_of, model_facts, plan_of
from tests.unit.test_chunked_loss import model_of

CPU = torch.device("cpu")
LENGTHS = (5, 17, 2, 9, 30, 3, 12)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Sequences of 2 to 30 tokens. Their first token is learned too, as that of a text is."""
    random = np.random.RandomState(0)
    folder = tmp_path_factory.mktemp("store") / "train"
    with TokenWriter(folder) as writer:
        for length in LENGTHS:
            writer.add(random.randint(3, 97, length).tolist(), [1, 1, *random.randint(0, 2, length - 2).tolist()])
    return TokenStore(folder)


def trained_on(model: Any, *tensors: Any, packed: Any = (), chunked: bool = False) -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of a micro-batch."""
    model.zero_grad()
    loss = summed_loss(model, *tensors, packed=packed, layer=LossLayer(model) if chunked else None)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(found: tuple[float, list[torch.Tensor]], expected: tuple[float, list[torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_loss_and_gradients_equal_those_of_padded_sequences(
    kind: str, options: dict, chunked: bool, store: TokenStore
) -> None:
    model = model_of(kind, **options).eval()
    sequences = np.arange(len(LENGTHS))
    expected = trained_on(model, *collate(store, sequences, CPU))
    with using_attention(model, document_attention.NAME):
        *tensors, packed = collate_row(store, sequences, CPU)
        assert tensors[0].shape == (1, 80) and packed == (*LENGTHS, 2)
        assert_same(trained_on(model, *tensors, packed=packed, chunked=chunked), expected)


def test_flash_attention_gets_the_borders_of_the_sequences(store: TokenStore) -> None:
    model = model_of("llama")
    sequences = np.arange(len(LENGTHS))
    expected = trained_on(model, *collate(store, sequences, CPU))
    with flash_imitation(), using_attention(model, "flash_attention_2"):
        *tensors, packed = collate_row(store, sequences, CPU)
        assert_same(trained_on(model, *tensors, packed=packed), expected)


def test_checkpointed_activations_are_computed_again_for_the_same_sequences(store: TokenStore) -> None:
    model = model_of("llama")
    sequences = np.arange(len(LENGTHS))
    expected = trained_on(model, *collate(store, sequences, CPU))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with using_attention(model, document_attention.NAME):
        *tensors, packed = collate_row(store, sequences, CPU)
        assert_same(trained_on(model, *tensors, packed=packed), expected)


def test_attention_without_the_borders_is_an_error(store: TokenStore) -> None:
    model = model_of("llama")
    *tensors, _ = collate_row(store, np.arange(3), CPU)
    with using_attention(model, document_attention.NAME), pytest.raises(ValueError, match="where the packed sequences"):
        summed_loss(model, *tensors)


BORDERS = ("document_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PLAIN = ("sdpa", "flash_attention_2", "flash_attention_3")


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, PLAIN),
        ("qwen3", {"head_dim": 8}, PLAIN),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}, PLAIN),
        ("mistral", {"sliding_window": 4096}, PLAIN),
        ("mixtral", {"num_local_experts": 4}, PLAIN),
        ("phi3", {}, PLAIN),
        # The rotary embeddings of a row depend on its longest sequence.
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, ()),
        # These cap attention, have no exchangeable attention, or carry a state from token to token.
        ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 5.0}, ()),
        ("bloom", {"n_layer": 2, "n_head": 2}, ()),
        ("mamba", {"state_size": 4}, ()),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, ()),
    ],
)
def test_the_probe_finds_the_attention_that_keeps_packed_sequences_apart(
    kind: str, options: dict, expected: tuple[str, ...]
) -> None:
    model = model_of(kind, **options)
    found = probe_small_model(type(model), model.config, model.num_parameters())
    assert found.failure is None
    assert found.packed_attention == expected


def test_the_probe_finds_a_model_that_keeps_the_borders_from_its_attention() -> None:
    model = model_of("llama")
    plain = type(model)

    class Joining(plain):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **options: Any) -> Any:
            passed_on = {name: given for name, given in options.items() if name not in BORDERS}
            return super().forward(*args, **passed_on)

    assert probe_small_model(Joining, model.config, 1000).packed_attention == ()
    assert probe_small_model(plain, model.config, 1000).packed_attention == PLAIN


def test_the_bins_of_an_update_do_not_depend_on_the_number_of_ranks(store: TokenStore) -> None:
    order = BinOrder(np.diff(store.offsets), 32, seed=3)
    assert len(order) == 3

    def learned(ranks: int, micro_batch: int, accumulation: int, first: int = 0) -> list[list[int]]:
        """The learned tokens of each of three updates."""
        found: list[list[int]] = [[] for _ in range(3)]
        for rank in range(ranks):
            share = Share(rank, ranks, micro_batch, accumulation)
            for batch in micro_batches(store, order, share, range(3), first):
                found[batch.update] += batch.labels[batch.labels != IGNORED].tolist()
        return [sorted(tokens) for tokens in found]

    expected = learned(1, 4, 1)
    assert learned(2, 1, 2) == learned(4, 1, 1) == learned(1, 2, 2) == expected
    assert [len(tokens) for tokens in expected] == [
        sum(int(store.targets[each].sum()) for each in order.take(4 * update, 4 * update + 4)) for update in range(3)
    ]
    # A run that resumes after the first update makes the updates that follow.
    assert learned(2, 2, 1, first=4)[:2] == expected[1:]


def test_grouping_by_length_changes_the_micro_batches_of_an_update_but_not_its_sequences(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    with TokenWriter(tmp_path / "train") as writer:
        for number in range(48):
            length = int(random.choice([4, 10, 60]))
            writer.add([100 + number] * length, [1] * length)
    store, order = TokenStore(tmp_path / "train"), SampleOrder(48, seed=3)

    def updates(ranks: int, by_length: bool) -> tuple[list[list[int]], int]:
        """(the sequences of each of three updates, the tokens with padding)."""
        found, computed = [[], [], []], 0  # type: list[list[int]], int
        for rank in range(ranks):
            share = Share(rank, ranks, 2, 8 // ranks)
            for batch in micro_batches(store, order, share, range(3), 0, by_length=by_length):
                found[batch.update] += batch.input_ids[:, 0].tolist()
                computed += batch.input_ids.numel()
        return [sorted(sequences) for sequences in found], computed

    padded, grouped = updates(1, False), updates(1, True)
    assert updates(2, True) == updates(4, True) == grouped
    assert grouped[0] == padded[0]
    tokens = int(store.offsets[-1])
    # Of each update, the sequences of two lengths share at most two micro-batches; lengths are rounded up to 8.
    assert grouped[1] < 1.3 * tokens < padded[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_in_rows_has_the_loss_of_padded_sequences(ranks: int, store: TokenStore) -> None:
    """With three ranks, the last one has no sequence in the last micro-batch."""
    model = model_of("llama")
    alone = SimpleNamespace(rank=0, world_size=1, device=CPU, sum=lambda values: values)
    expected = evaluate(model, store, 2, alone)
    totals = 0.0
    with using_attention(model, document_attention.NAME):
        for rank in range(ranks):
            one = SimpleNamespace(rank=rank, world_size=ranks, device=CPU, sum=lambda values: values)
            totals += evaluate(model, store, 2, one, packing=True).loss
    assert totals == pytest.approx(expected.loss, rel=1e-6)


def test_data_that_fills_another_number_of_bins_than_planned_stops_the_run(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train") as writer:
        for _ in range(5):
            writer.add([7] * 10, [1] * 10)
    store = TokenStore(tmp_path / "train")
    job = job_of(data={"packing": True, "max_length": 32}, train={"max_steps": 1, "train_batch_size": 8})

    def plan(bins: int) -> Plan:
        return plan_of(job, model=model_facts(packed_attention=PLAIN), data=data_facts(5, bins=bins))

    assert len(order_of(plan(2), store)) == 2
    with pytest.raises(RunFailed, match="the training data fills 2 bins, but 3 are planned") as caught:
        order_of(plan(3), store)
    assert caught.value.code == FailureCode.DATA_DIFFERS
