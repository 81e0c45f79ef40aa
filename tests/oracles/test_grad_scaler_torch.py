"""GradScaler beside PyTorch's: the same scales, the same skipped steps, the same weights."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_states_and_weights_step_for_step(interval, bad):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 3)).astype(np.float32)
    p, q = mp.nn.Parameter(w.copy()), torch.nn.Parameter(torch.from_numpy(w.copy()))
    ours, theirs = mp.optim.SGD([p], lr=0.125), torch.optim.SGD([q], lr=0.125)
    options = {"init_scale": 2.0**10, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": interval}
    scaler, other = mp.GradScaler(**options), torch.amp.GradScaler("cpu", **options)
    for step in range(12):
        x = rng.standard_normal((4, 3)).astype(np.float32)
        loss, their_loss = (p * x).sum(), (q * torch.from_numpy(x)).sum()
        scaler.scale(loss).backward()
        other.scale(their_loss).backward()
        if step in (2, 3, 8):
            p.grad[1, 1] = bad
            q.grad[1, 1] = float(bad)
        if step % 2:  # clipping, which needs unscaled gradients
            finite = scaler.unscale_(ours)
            other.unscale_(theirs)
            assert finite == (step != 3)
            np.testing.assert_array_equal(p.grad, q.grad.numpy())
        scaler.step(ours)
        other.step(theirs)
        scaler.update()
        other.update()
        assert scaler.get_scale() == other.get_scale()
        assert scaler.state_dict() == other.state_dict()
        np.testing.assert_array_equal(p.data, q.detach().numpy())
        ours.zero_grad()
        theirs.zero_grad()
    again = mp.GradScaler()
    again.load_state_dict(other.state_dict())
    assert again.state_dict() == scaler.state_dict()


def test_the_defaults_are_pytorchs():
    ours, theirs = mp.GradScaler(), torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))
    assert ours.state_dict() == theirs.state_dict()
