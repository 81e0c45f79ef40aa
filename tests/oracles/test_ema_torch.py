"""EMA against PyTorch's AveragedModel."""

import numpy as np
import pytest

from minipeft.nn import Linear
from minipeft.train import EMA

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")


def test_the_average_is_pytorchs(rng):
    ours, theirs, ema = Linear(4, 3), torch.nn.Linear(4, 3), EMA(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(1, 7):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.data = rng.standard_normal(p.shape, np.float32)
            q.data = torch.tensor(p.data)
        ema.after_step(ours, step, {})
        averaged.update_parameters(theirs)
    with ema.applied(ours):
        for p, q in zip(ours.parameters(), averaged.module.parameters()):
            np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-6, atol=1e-7)
