"""The graph as text and picture, and why a parameter does not move."""

import numpy as np
import pytest
from models import build, tokens

import minipeft as mp
from minipeft.autograd.tensor import AutogradError, checkpoint
from minipeft.nn import Linear, Module, ModuleList

F = mp.functional


def small(xp=np):
    x, W = (mp.Tensor(xp.ones(shape), requires_grad=True) for shape in ((4, 3), (3, 3)))
    return x, W, (F.relu(x @ W) * x).sum()


def test_a_graph_is_a_line_for_each_op(xp):
    x, W, loss = small(xp)
    text = ["1  matmul  [4, 3]  x, W", "2  relu    [4, 3]  1", "3  mul     [4, 3]  2, x", "4  sum     []      3"]
    assert str(loss.graph({"x": x, "W": W})).splitlines() == text
    assert str(loss.graph()).splitlines()[0] == "1  matmul  [4, 3]  Tensor [4, 3], Tensor [3, 3]"
    kept = loss.graph()
    loss.backward()  # the graph is a copy: it holds nothing back, and outlives the pass
    assert len(kept.steps) == 4 and x.grad is not None


def test_a_models_parameters_have_their_names_and_each_op_comes_once(rng):
    model, ids = build("llama"), tokens(rng, 2, 5)
    steps = model.loss(ids, ids).graph(model).steps
    leaves = {name for step in steps for name in step.inputs if isinstance(name, str)}
    assert leaves == {name for name, _ in model.named_parameters()}
    assert steps[0] == ("embedding", (2, 5, 16), ("model.embed_tokens.weight",)) and steps[-1].shape == ()
    read = {place for step in steps for place in step.inputs if isinstance(place, int)}
    assert read == set(range(len(steps) - 1))  # every result but the loss is read
    assert all(place < i for i, step in enumerate(steps) for place in step.inputs if isinstance(place, int))
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2))
    assert len(str(adapted.loss(ids, ids).graph(adapted)).splitlines()) < 1.2 * len(steps)  # what is frozen has no ops
    w = mp.Tensor(np.ones(3), requires_grad=True)
    assert [step.op for step in checkpoint(lambda x: (x * w).sum(), w, parameters=[w]).graph().steps] == ["checkpoint"]


def test_a_picture_of_a_small_graph(tmp_path, rng):
    _, _, loss = small()
    loss.graph().plot(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    model, ids = build("llama", num_hidden_layers=4), tokens(rng, 1, 4)
    with pytest.raises(
        ValueError, match=r"a picture shows 60 ops and leaves at most, and this graph has \d+: print it"
    ):
        model.loss(ids, ids).graph(model).plot(tmp_path / "large.png")
    assert not (tmp_path / "large.png").exists()


def test_what_has_no_graph_says_so():
    x, _, loss = small()
    with pytest.raises(AutogradError, match="leaf"):
        x.graph()
    with pytest.raises(AutogradError, match="does not require gradients"):
        mp.Tensor(1.0).graph()
    loss.backward()
    with pytest.raises(AutogradError, match="freed"):
        loss.graph()


# -------------------------------------------------------------------------------------------- why a parameter is unmoved


class Net(Module):
    def __init__(self):
        self.first, self.layers = Linear(3, 3, seed=1), ModuleList([Linear(3, 3, seed=2), Linear(3, 3, seed=3)])
        self.unused, self.side = Linear(3, 3), Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        self.side(x)
        return x


def why(net, loss=None, optimizer=None, x=None):
    x = mp.Tensor(np.ones((2, 3), np.float32)) if x is None else x
    return mp.why_unmoved(net, loss or (lambda: (net(x) ** 2).sum()), optimizer)


def test_what_moves_has_no_reason_and_nothing_is_changed():
    net = Net()
    net.first.weight.grad = held = np.ones((3, 3), np.float32)
    before = {path: array.copy() for path, array in net.state_dict().items()}
    assert {path.rpartition(".")[0] for path in why(net)} == {"unused", "side"}
    assert net.first.weight.grad is held and (held == 1).all() and net.layers[0].weight.grad is None
    assert all(np.array_equal(array, before[path]) for path, array in net.state_dict().items())


def test_frozen_left_out_of_the_optimizer_and_a_rate_of_zero():
    net = Net()
    net.first.weight.requires_grad = False
    groups = [
        {"params": [net.layers[0].weight], "lr": 0.0},
        {"params": [net.layers[0].bias, *net.layers[1].parameters()]},
    ]
    reasons = why(net, optimizer=mp.optim.SGD(groups, lr=0.1))
    assert reasons["first.weight"] == "frozen: requires_grad is False"
    assert reasons["first.bias"] == "not in the optimizer"
    assert reasons["layers.0.weight"] == "its learning rate is 0"
    assert not {"layers.0.bias", "layers.1.weight"} & reasons.keys()


def test_where_the_way_from_the_loss_is_cut():
    net = Net()
    reasons = why(net)
    assert reasons["unused.weight"].endswith(
        "unused was not called, the last module called on the way to it is the model"
    )
    assert reasons["side.weight"] == "not reached from the loss: the result of side was detached, or is not used"
    model, ids = build("llama"), np.arange(5)[None]

    class Cut(Module):
        def __init__(self, inner):
            self.inner = inner

        def forward(self, x, rng=None):
            return self.inner(x, rng).detach()

    model.model.layers[1].mlp = Cut(model.model.layers[1].mlp)
    reasons = mp.why_unmoved(model, lambda: model.loss(ids, ids))
    path = "model.layers.1.mlp.inner"
    assert reasons[f"{path}.up_proj.weight"] == (
        "not reached from the loss: the result of model.layers.1.mlp was detached, or is not used, inside model.layers.1"
    )
    assert not any(name.startswith("model.layers.0") for name in reasons)
    with mp.no_grad():
        value = model.loss(ids, ids)
    assert set(mp.why_unmoved(model, lambda: value)) == set(dict(model.named_parameters()))
    assert "the loss has no graph" in mp.why_unmoved(model, lambda: value)["model.norm.weight"]


def test_the_zero_factor_of_lora_is_named(rng, xp):
    model, ids = build("llama", xp), xp.asarray(tokens(rng, 1, 5))
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.add_adapter("other", mp.LoraConfig(r=2, target_modules=["q_proj"]))
    for _, part in adapted.parts("other"):
        part.requires_grad_(True)

    def reasons():
        found = mp.why_unmoved(adapted, lambda: adapted.loss(ids, ids))
        return {path: reason for path, reason in found.items() if not reason.startswith("frozen")}

    layer = "base_model.model.layers.0.self_attn.q_proj"
    assert reasons()[f"{layer}.default.lora_A"] == (
        f"its gradient is exactly 0, lost in linear, where {layer}.default.lora_B is all zeros: linear > linear > lora_A"
    )
    assert f"{layer}.default.lora_B" not in reasons()
    assert (
        f"{layer}.other was not called, the last module called on the way to it is {layer}"
        in reasons()[f"{layer}.other.lora_B"]
    )
    adapted.loss(ids, ids).backward()
    mp.optim.SGD([p for _, p in adapted.named_parameters() if p.requires_grad], lr=1.0).step()
    assert all(".other." in path for path in reasons())


def test_a_dead_unit_and_terms_that_cancel():
    net, x = Net(), mp.Tensor(np.ones((2, 3), np.float32))
    dead = why(net, lambda: F.relu(net(x) - 100.0).sum())
    assert dead["layers.0.weight"] == "its gradient is exactly 0, lost in relu: relu > sub > linear > linear > weight"
    w = net.layers[1].weight
    cancelled = why(net, lambda: (w * 2).sum() - (w + w).sum())
    assert cancelled["layers.1.weight"] == "its gradient is exactly 0: the terms from 3 ops cancel"


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (mp.Tensor(np.float64(1)), TypeError, "give a function, .* not a Tensor"),
        (lambda: 0.5, TypeError, "must be a Tensor, .* not a float: 0.5"),
        (lambda: mp.Tensor(np.array(np.nan)), ValueError, "the loss is nan"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_said(loss, error, message):
    with pytest.raises(error, match=message):
        mp.why_unmoved(build("llama"), loss)
