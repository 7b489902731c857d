"""Each regulariser against its formula, its gradient against autograd's, two ranks against one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from lightning_modules import Stage3
from lightning_modules.optimizer import Optimizer
from lightning_modules.stage import Objective
from stair.regularisers import Flops, TargetTerms, within_budget
from tests.support.models import tiny_config

KINDS = {"flops": Flops, "target": lambda: TargetTerms(5.0)}
NAMES = tuple(KINDS)


def batch(rows=6, words=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, words, generator=generator, dtype=torch.float64)
    return weights * (torch.rand(rows, words, generator=generator) < 0.6)


def oracle(rows):
    """The value by its formula, word by word, differentiable."""
    return sum(rows[:, v].mean() ** 2 for v in range(rows.shape[1]))


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_formula(name):
    rows = batch()
    rows[:, 2] = 0  # a word that is never on
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    got, expected = KINDS[name]()(ours), oracle(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    got.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_rows_give_the_value_of_full_ones(name):
    rows = batch().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = KINDS[name]()(rows)
    torch.testing.assert_close(got, KINDS[name]()(rows.float()))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_of_words_costs_nothing_and_has_a_gradient_without_nan(name):
    rows = torch.zeros(4, 9, requires_grad=True)
    value = KINDS[name]()(rows)
    value.backward()
    assert value.item() == 0 and rows.grad.isfinite().all()


def test_lambda_is_adjusted_until_the_target_number_of_terms_is_active():
    # a made-up side: the weight that λ asks for decides how many of 100 words stay on
    control, words = TargetTerms(20.0, rate=0.05), torch.linspace(0, 1, 100)
    for _ in range(600):
        on = (words > float(control.factor) * 0.01).float()
        control(on.repeat(3, 1).requires_grad_())
    assert float(on.sum()) == pytest.approx(20, abs=2)


def test_lambda_rests_for_a_frozen_side_and_while_it_has_not_risen():
    control = TargetTerms(2.0)
    control(batch())
    control(batch().requires_grad_(), 0.0)
    assert float(control.factor) == 1
    control(batch().requires_grad_(), 1.0)
    assert float(control.factor) > 1


def test_what_a_regulariser_remembers_is_in_its_state():
    one, two = TargetTerms(2.0), TargetTerms(2.0)
    one(batch().requires_grad_())
    two.load_state_dict(one.state_dict())
    rows = batch(seed=3).requires_grad_()
    assert one(rows).item() == two(rows).item() and float(one.factor) == float(two.factor) != 1


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        rows = batch()[3 * rank : 3 * rank + 3].clone().requires_grad_()
        kept = KINDS[name]()
        value = kept(rows)
        value.backward()
        # data-parallel training averages gradients over ranks
        found[name] = value.detach(), rows.grad / 2, kept.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_value_the_update_and_the_memory_of_one(tmp_path: Path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (value, gradient, state) in found.items():
            rows, alone = batch().requires_grad_(), KINDS[name]()
            expected = alone(rows)
            expected.backward()
            torch.testing.assert_close(value, expected.detach())
            torch.testing.assert_close(gradient, rows.grad[3 * rank : 3 * rank + 3])
            torch.testing.assert_close(state, alone.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_takes_steps_with_each(vocab_file, captions, pixels, monkeypatch, name):
    torch.manual_seed(0)
    stage = Stage3(tiny_config(vocab_file), Objective(scale_start=3.0, regulariser=name, target_text=2.0), Optimizer())
    monkeypatch.setattr(stage, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(stage, "_trainer", SimpleNamespace(global_step=9))
    monkeypatch.setattr(Stage3, "trainer", property(lambda self: self._trainer))
    ids, mask = stage.stair.vocabulary.tokenize(captions, 12)
    found = [stage.train().training_step({"pixels": pixels, "ids": ids, "mask": mask}, 9) for _ in range(2)]
    cost = float(found[1]["lambda_text"]) * float(found[1]["flops_text"])
    cost += float(found[1]["lambda_image"]) * float(found[1]["flops_image"])
    assert float(found[1]["loss"].detach()) == pytest.approx(float(found[1]["contrastive"]) + cost, rel=1e-5)
    # only `target` moves λ, and it rises while more words are active than wanted
    assert (float(found[1]["lambda_text"]) > 1.001e-3) == (name == "target")


@pytest.mark.parametrize("budget", [1, 4, 9, 20])
def test_a_budget_keeps_the_heaviest_terms_and_those_below_zero(budget):
    signed_BV = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept_BV = within_budget(signed_BV, budget)
    expected_BV = torch.zeros(6, 9)
    for b, row_V in enumerate(signed_BV.tolist()):
        heaviest = sorted(range(9), key=lambda v: -row_V[v])[:budget]
        for v, weight in enumerate(row_V):
            if v in heaviest or weight < 0:
                expected_BV[b, v] = weight
    assert torch.equal(kept_BV, expected_BV)
    (gradient_BV,) = torch.autograd.grad(kept_BV.sum(), [signed_BV])
    assert torch.equal(gradient_BV != 0, expected_BV != 0)
