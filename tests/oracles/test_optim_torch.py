"""Optimizers, clipping and schedules against PyTorch and transformers: the same numbers to float32 rounding."""

import numpy as np
import pytest

from minipeft.nn import Parameter
from minipeft.train import SGD, Adam, AdamW, clip_grad_norm
from minipeft.train.schedule import SCHEDULES

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")

CASES = {
    "adamw": (AdamW, {}),
    "adamw-options": (AdamW, {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.3}),
    "adam": (Adam, {}),
    "adam-decay": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (SGD, {}),
    "sgd-decay": (SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}),
    "sgd-nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_hundred_steps_of_two_groups_with_clipping(case, dtype, rng):
    kind, options = CASES[case]
    shapes = [(150, 130), (40,), (3, 4, 5), ()]
    ours = [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.tensor(p.data)) for p in ours]
    mine = kind([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.003}], **options)
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.003}]
    peer = getattr(torch.optim, kind.__name__)(groups, **options, foreach=False)
    for step in range(200):
        for i, (p, t) in enumerate(zip(ours, theirs)):
            if i == 1 and step % 3 == 0:  # a gradient that is sometimes missing
                p.grad = t.grad = None
                continue
            p.grad = rng.standard_normal(p.shape).astype(dtype)
            t.grad = torch.tensor(p.grad)
        norm = clip_grad_norm(ours, 100.0)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 100.0).item(), rel=1e-5)
        mine.step()
        peer.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for p, t in zip(ours, theirs):
        np.testing.assert_allclose(p.data, t.detach().numpy(), **tolerance)


def test_defaults_are_pytorchs():
    ours, theirs = Parameter(np.zeros(1, np.float32)), torch.nn.Parameter(torch.zeros(1))
    for kind in (SGD, Adam, AdamW):
        peer = getattr(torch.optim, kind.__name__)([theirs]).defaults
        mine = kind([ours]).defaults
        assert mine == {name: peer[name] for name in mine}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 20), (5, 20), (1, 1), (20, 20)])
def test_schedules_are_those_of_transformers(name, warmup, total):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    schedule = make(optimizer, warmup) if name == "constant" else make(optimizer, warmup, total)
    for step in range(total + 1):
        assert SCHEDULES[name](step, warmup, total) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
