"""The whole method in one plain file, and the project's own head and losses against it."""

import importlib.util
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stair.head import VocabularyHead
from stair.losses import flops, info_nce

FILE = Path(__file__).parents[1] / "examples" / "stair_in_100_lines.py"
SPEC = importlib.util.spec_from_file_location("stair_in_100_lines", FILE)
assert SPEC is not None and SPEC.loader is not None
plain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain)


def test_the_method_fits_in_100_lines_of_code():
    passed_over = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with FILE.open("rb") as file:
        lines = set()
        for token in tokenize.tokenize(file.readline):
            docstring = token.type == tokenize.STRING and token.string.startswith('"""')
            if token.type not in (*passed_over, tokenize.ENCODING, tokenize.ENDMARKER) and not docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
    assert len(lines) <= 100


@pytest.mark.parametrize("margin", [0.0, 3.0])
def test_the_head_and_its_gradients_equal_the_plain_head(margin: float):
    torch.manual_seed(0)
    V, B, T = 40, 5, 7
    oracle = plain.Head(torch.randn(V, plain.D))
    torch.nn.init.normal_(oracle.b)
    oracle.norm.eps = 1e-12
    head = VocabularyHead(plain.D, torch.nn.Parameter(oracle.E.detach().clone()), never_active=[plain.PAD])
    head.dense.load_state_dict(oracle.dense.state_dict())
    head.norm.load_state_dict(oracle.norm.state_dict())
    head.bias.data.copy_(oracle.b.data)

    ids_BT = torch.randint(1, V, (B, T))
    mask_BT = torch.arange(T) < torch.tensor([7, 3, 1, 5, 7])[:, None]
    ids_BT[~mask_BT] = plain.PAD
    hidden_BTD, cotangent_BV = torch.randn(B, T, plain.D), torch.randn(B, V)
    cotangent_BV[:, plain.PAD] = 0  # [PAD] is never active in the project's head

    want_BV = oracle(hidden_BTD, mask_BT, margin * ~plain.in_caption(ids_BT, V))
    got_BV = head(hidden_BTD, mask_BT, ids_BT, margin)
    torch.testing.assert_close(got_BV[:, 1:], want_BV[:, 1:], atol=1e-5, rtol=1e-5)
    want = torch.autograd.grad((want_BV * cotangent_BV).sum(), [oracle.dense.weight, oracle.E, oracle.b])
    got = torch.autograd.grad((got_BV * cotangent_BV).sum(), [head.dense.weight, head.word_embeddings, head.bias])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_losses_and_their_gradients_equal_the_plain_losses():
    torch.manual_seed(0)
    image_BV, text_BV = (F.relu(torch.randn(6, 30)).requires_grad_() for _ in range(2))
    scale = torch.tensor([5.0], requires_grad=True)
    for got, want in (
        (info_nce(image_BV, text_BV, scale, cosine=True).loss, plain.info_nce(image_BV, text_BV, scale)),
        (flops(image_BV) + flops(text_BV), plain.flops(image_BV) + plain.flops(text_BV)),
    ):
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(
            torch.autograd.grad(got, [image_BV, text_BV]), torch.autograd.grad(want, [image_BV, text_BV]), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on an idle core
def test_the_plain_file_learns_to_retrieve():
    done = subprocess.run(
        [sys.executable, FILE],
        cwd=FILE.parents[1],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    recall = [float(line.split("R@1 ")[1].split()[0]) for line in done.stdout.splitlines() if "R@1" in line]
    assert len(recall) == 3
    assert recall[-1] > 15  # chance is 0.3
