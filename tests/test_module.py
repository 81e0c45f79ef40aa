"""Modules: paths, replacement, copies, ties, and states that load whole or not at all."""

from __future__ import annotations

import math

import numpy as np
import pytest

import minipeft as mp
from minipeft.backend import BackendError, to_numpy
from minipeft.nn import Linear, Module, ModuleList, Parameter, Sequential
from minipeft.nn.module import unallocated


class Tied(Module):
    """Two layers that share one weight, a list, and things that are no parameters."""

    def __init__(self):
        self.first = Linear(3, 3, seed=1)
        self.rest = ModuleList([Linear(3, 3, bias=False, seed=2), Sequential(Linear(3, 3, seed=3), mp.functional.relu)])
        self.scale = Parameter(np.full(3, 2.0, np.float32))
        self.rest[0].weight = self.first.weight
        self.label, self.numbers, self.table = "tied", [1, 2], {"a": 1}

    def forward(self, x):
        return self.rest[1](self.rest[0](self.first(x))) * self.scale


NAMES = ["scale", "first.weight", "first.bias", "rest.1.0.weight", "rest.1.0.bias"]


def test_paths_are_attributes_in_order_and_a_tied_parameter_comes_once():
    model = Tied()
    assert [path for path, _ in model.named_parameters()] == NAMES
    assert [p for p, _ in model.all_named_parameters()] == [*NAMES[:3], "rest.0.weight", *NAMES[3:]]
    assert [p for p, _ in model.named_modules()] == ["", "first", "rest", "rest.0", "rest.1", "rest.1.0"]
    assert list(model.state_dict()) == NAMES and len(model.parameters()) == 5
    assert model.state_dict()["scale"] is model.scale.data  # live, not a copy


def test_get_submodule_and_replace_reach_into_lists():
    model, x = Tied(), np.ones((2, 3), np.float32)
    assert model.get_submodule("") is model and model.get_submodule("rest.1.0") is model.rest[1][0]
    new = Linear(3, 3, seed=9)
    before = model(mp.Tensor(x)).data
    model.replace("rest.1.0", new)
    assert model.rest[1][0] is new and not np.allclose(model(mp.Tensor(x)).data, before)
    model.replace("first", new)
    assert model.first is new


@pytest.mark.parametrize("path", ["rest.0.weight", "rest.7", "frist", "rest.1.0.x", ".", "first."])
def test_a_path_that_does_not_exist_names_its_neighbours(path):
    model = Tied()
    for call in (model.get_submodule, lambda p: model.replace(p, Linear(3, 3))):
        with pytest.raises(KeyError, match="no module"):
            call(path)
    with pytest.raises(KeyError, match=r"nearest: .*first"):
        model.get_submodule("frist")


def test_near_misses_in_a_transformer():
    model = mp.Transformer(mp.TransformerConfig(num_hidden_layers=1), seed=None)
    with pytest.raises(KeyError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        model.get_submodule("model.layers.0.self_attn.q_prj")


def test_the_root_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match="names a module inside"):
        Tied().replace("", Linear(3, 3))


# ------------------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("share", [True, False])
def test_a_copy_has_its_own_parameters_with_the_same_ties(share, xp):
    model = Tied().to(xp)
    model.first.bias.requires_grad = False
    twin = model.copy(share=share)
    for (path, p), (other, q) in zip(model.named_parameters(), twin.named_parameters()):
        assert path == other and p is not q and p.requires_grad == q.requires_grad
        assert (p.data is q.data) == share
        assert np.array_equal(to_numpy(p.data), to_numpy(q.data))
    assert twin.rest[0].weight is twin.first.weight
    assert twin.rest is not model.rest and twin.numbers == [1, 2] and twin.label == "tied"
    twin.rest.append(Linear(3, 3))
    twin.numbers.append(3)
    twin.table["b"] = 2
    assert len(model.rest) == 2 and model.numbers == [1, 2] and model.table == {"a": 1}


def test_surgery_on_a_shared_copy_leaves_the_original_alone():
    model, x = Tied(), mp.Tensor(np.ones((2, 3), np.float32))
    before, twin = model(x).data, model.copy(share=True)
    twin.replace("rest.0", Linear(3, 3, seed=7))
    twin.scale = Parameter(np.zeros(3, np.float32))
    assert np.array_equal(model(x).data, before) and not twin(x).data.any()
    twin.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_has_arrays_of_its_own_that_are_no_parameters():
    class Counter(Module):
        def __init__(self):
            self.seen = np.zeros(2)

    model = Counter()
    assert model.copy().seen is not model.seen and model.copy(share=True).seen is model.seen


def test_a_part_of_a_list_of_modules_is_one():
    layers = Sequential(*(Linear(2, 2, seed=i) for i in range(3)))
    part = layers[:2]
    assert type(part) is Sequential and [name for name, _ in part.named_parameters()][::2] == ["0.weight", "1.weight"]


def test_writing_into_an_independent_copy_leaves_the_original_alone():
    model = Tied()
    before = {path: a.copy() for path, a in model.state_dict().items()}
    for p in model.copy().parameters():
        p.data += 1
    assert all(np.array_equal(a, before[path]) for path, a in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ states


def test_a_state_loads_as_copies_under_any_tied_name(xp):
    model, source = Tied().to(xp), Tied()
    state = {path: np.random.default_rng(i).random(a.shape) for i, (path, a) in enumerate(source.state_dict().items())}
    state["rest.0.weight"] = state.pop("first.weight")
    model.load_state_dict(state)
    assert model.first.weight is model.rest[0].weight
    for path, array in model.state_dict().items():
        given = state["rest.0.weight" if path == "first.weight" else path]
        assert type(array) is xp.ndarray and array.dtype == np.float32  # the parameter's dtype and device stay
        np.testing.assert_allclose(to_numpy(array), given, rtol=1e-7)
    same = Tied()
    given = same.copy().state_dict()
    same.load_state_dict(given)
    given["scale"][:] = 99
    assert (same.scale.data == 2).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("scale"), "missing scale; unexpected nothing"),
        (lambda s: s.update(extra=s["scale"]), "missing nothing; unexpected extra"),
        (lambda s: s.update({"rest.0.weight": np.zeros((3, 3))}), "first.weight and rest.0.weight are one parameter"),
        (
            lambda s: s.update({"rest.1.0.bias": np.zeros(4)}),
            r"rest.1.0.bias: the state has shape \(4,\), the model \(3,\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = Tied()
    before = {path: a.copy() for path, a in model.state_dict().items()}
    state = {path: a + 1 for path, a in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert all(np.array_equal(a, before[path]) for path, a in model.state_dict().items())


def test_a_tied_parameter_may_be_in_a_state_twice():
    weight = np.full((3, 3), math.nan, np.float32)
    for twice in ({"first.weight": weight, "rest.0.weight": weight}, {"first.weight": weight, "rest.0.weight": weight.astype(np.float16)}):
        model = Tied()
        model.load_state_dict(model.state_dict() | twice)


def test_loading_without_strict_takes_what_fits():
    model = Tied()
    model.load_state_dict({"scale": np.zeros(3), "extra": np.zeros(1)}, strict=False)
    assert not model.scale.data.any()
    with pytest.raises(ValueError, match="are one parameter of this model, and the state has two values of it"):
        model.load_state_dict({"first.weight": np.zeros((3, 3)), "rest.0.weight": np.ones((3, 3))}, strict=False)


def test_modules_in_a_row_are_given_their_own_random_numbers():
    row = mp.nn.Sequential(mp.nn.Dropout(0.5), mp.functional.relu, mp.nn.Dropout(0.5))
    x = mp.Tensor(np.ones((1, 4000), "f"))
    assert row(x).data.tolist() == x.data.tolist() and 0.7 < (row(x, mp.backend.Rng(0)).data == 0).mean() < 0.8


def test_many_missing_keys_are_summed_up():
    with pytest.raises(ValueError, match="and 7 more"):
        mp.Transformer(mp.TransformerConfig(num_hidden_layers=1, tie_word_embeddings=False), seed=None).load_state_dict(
            {}
        )


# ------------------------------------------------------------------------------------------------------------ values


def test_requires_grad_zero_grad_and_moves(xp):
    model = Tied().to(xp)
    model(mp.Tensor(xp.ones((2, 3), "float32"))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert model.requires_grad_(False) is model and not any(p.requires_grad for p in model.parameters())
    assert model.to("numpy") is model and all(type(p.data) is np.ndarray for p in model.parameters())
    assert model.rest[0].weight is model.first.weight


def test_a_model_is_moved_to_an_array_library_and_not_to_a_type():
    with pytest.raises(BackendError, match=r"to\(\) takes an array library, 'numpy', 'cupy' or a module, not float64"):
        Tied().to(np.float64)


@pytest.mark.parametrize(("asked", "dtype"), [
    ("bfloat16", "bfloat16"), ("fp16", "float16"), (np.float16, "float16"), (np.dtype("float16"), "float16"),
])  # fmt: skip
def test_a_model_is_not_moved_to_sixteen_bits_but_computes_in_them(asked, dtype):
    model = Tied()
    with pytest.raises(BackendError, match=rf"stay float32.*inside mp\.autocast\('{dtype}'\)"):
        model.to(asked)


def test_an_unallocated_weight_has_a_shape_no_memory_and_cannot_be_written():
    a = unallocated(1000, 1000, 1000, 1000)
    assert a.shape == (1000,) * 4 and a.dtype == np.float32 and not any(a.strides)
    with pytest.raises(ValueError, match="read-only"):
        a[0, 0, 0, 0] = 1


def test_a_module_without_a_forward_says_so():
    with pytest.raises(NotImplementedError, match="ModuleList defines no forward"):
        ModuleList([])(1)
