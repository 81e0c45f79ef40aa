"""Every method against Hugging Face PEFT on the same weights: files both ways, gradients, one AdamW step, counts."""

import json
import warnings

import numpy as np
import pytest
from test_plugins import EXAMPLE
from twins import torch, twin_of

import minipeft as mp
from minipeft.peft.config import PeftError
from minipeft.peft.huggingface import PEFT_TYPES, state
from minipeft.peft.methods import METHODS

peft = pytest.importorskip("peft", reason="needs the extra 'oracles'")

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
IDS = np.random.default_rng(3).integers(0, 60, (3, 9))


def base(dialect, dtype="float64", gaps=False, tied=True):
    """Our model and the transformers model with the same weights, both in float64, where only real differences show.

    With `gaps`, each singular value of a matrix is 0.7 of the one before: a singular direction is known only to the
    rounding error divided by the gap beside it, and a random matrix has gaps of any size.
    """
    grouped = dict(num_key_value_heads=2, intermediate_size=48) if dialect == "llama" else {}
    model = mp.Transformer(mp.TransformerConfig(model_type=dialect, initializer_range=0.2, tie_word_embeddings=tied, **SHAPE, **grouped), seed=5)
    generator = np.random.default_rng(6)
    for p in model.parameters():  # biases and norms that are not zeros and ones
        noise = generator.standard_normal(p.shape) * 0.1 if p.ndim == 1 else 0
        p.data = (p.data + noise).astype(dtype)
        if gaps and p.ndim == 2:
            U, S, Vt = np.linalg.svd(p.data.astype("float64"), full_matrices=False)
            p.data = (U * (S[0] * 0.7 ** np.arange(len(S))) @ Vt).astype(dtype)
    return model, twin_of(model, dtype)


def logits(twin):
    with torch.no_grad():
        return twin(torch.tensor(IDS)).logits.numpy()


def train_ours(model, steps=3, lr=2e-2):
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    callbacks = model.training_callbacks()
    for step in range(1, steps + 1):
        model.zero_grad()
        model.loss(IDS, IDS).backward()
        for callback in callbacks:
            callback.before_step(model, step)
        optimizer.step()
        for callback in callbacks:
            callback.after_step(model, step, {})
    return model


def fixed_divisor(twin):
    """PEFT 0.21 also trains AdaLoRA's divisor `ranknum`, and does not save it: hold it. Returns their number."""
    divisors = [p for name, p in twin.named_parameters() if "ranknum" in name]
    for p in divisors:
        p.requires_grad_(False)
    return len(divisors)


def train_theirs(twin, steps=3, lr=2e-2):
    twin.train()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        twin(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
        optimizer.step()
        if hasattr(twin.base_model, "update_and_allocate"):
            twin.base_model.update_and_allocate(step + 1)
    return twin.eval()


LINEAR = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "down_proj"]}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
NORM = {"gpt2": "ln_f", "llama": "norm"}
LAST = {"gpt2": r".*h\.1\..*c_proj", "llama": r".*layers\.1\..*_proj"}
ADALORA = dict(total_step=3, tinit=0, tfinal=1, deltaT=1, init_r=4, target_r=2, lora_alpha=8)

CASES = {
    "lora": ("Lora", lambda d: dict(r=4, lora_alpha=6)),
    "lora all-linear": ("Lora", lambda d: dict(r=4, target_modules="all-linear")),
    "lora regex": ("Lora", lambda d: dict(r=4, target_modules=LAST[d])),
    "lora one layer": ("Lora", lambda d: dict(r=4, target_modules=LINEAR[d], layers_to_transform=[1])),
    "lora excluded": ("Lora", lambda d: dict(r=4, target_modules=LINEAR[d], exclude_modules=LINEAR[d][:1])),
    "rslora": ("Lora", lambda d: dict(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR[d])),
    "dora": ("Lora", lambda d: dict(r=4, lora_alpha=6, use_dora=True, target_modules=LINEAR[d])),
    "patterns": (
        "Lora",
        lambda d: dict(r=4, target_modules=LINEAR[d], rank_pattern={LINEAR[d][0]: 2}, alpha_pattern={r".*\.1\..*": 3}),
    ),
    "embedding": ("Lora", lambda d: dict(r=4, lora_alpha=6, target_modules=[EMBEDDING[d], LINEAR[d][0]])),
    "dora embedding": ("Lora", lambda d: dict(r=4, use_dora=True, target_modules=[EMBEDDING[d]])),
    "modules_to_save": ("Lora", lambda d: dict(r=4, target_modules=LINEAR[d], modules_to_save=["lm_head", NORM[d]])),
    "pissa": ("Lora", lambda d: dict(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=LINEAR[d])),
    "gaussian": ("Lora", lambda d: dict(r=4, init_lora_weights="gaussian")),
    "random": ("Lora", lambda d: dict(r=4, init_lora_weights=False, target_modules=[EMBEDDING[d], LINEAR[d][0]])),
    "tokens": ("TrainableTokens", lambda d: dict(token_indices=[7, 3, 59])),
    "lora and tokens": ("Lora", lambda d: dict(r=4, lora_alpha=6, trainable_token_indices=[7, 3, 59])),
    "lora and named tokens": (
        "Lora",
        lambda d: dict(r=4, target_modules=LINEAR[d], trainable_token_indices={EMBEDDING[d]: [7, 3]}),
    ),
    "ia3": ("IA3", lambda d: dict()),
    "ia3 chosen": ("IA3", lambda d: dict(target_modules=LINEAR[d], feedforward_modules=LINEAR[d][1:])),
    "ia3 by other ends of the usual paths": (
        "IA3",
        lambda d: dict(target_modules={"gpt2": ["c_proj"], "llama": ["mlp.down_proj", "v_proj"]}[d]),
    ),
    "ln_tuning": ("LNTuning", lambda d: dict()),
    "vera": ("Vera", lambda d: dict(r=8, target_modules=LINEAR[d])),
    "adalora": ("AdaLora", lambda d: dict(ADALORA, target_modules=LINEAR[d])),
}
CASES["embedding and head"] = ("Lora", lambda d: dict(r=4, target_modules=[EMBEDDING[d], "lm_head"]))
LLAMA = {  # methods that PEFT does not put on GPT-2's [in, out] layers
    "loha": ("LoHa", lambda d: dict(r=4, alpha=6, target_modules=LINEAR[d])),
    "loha patterns": (
        "LoHa",
        lambda d: dict(target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={r".*\.1\..*": 3}),
    ),
    "lokr": ("LoKr", lambda d: dict(r=2, alpha=3)),
    "lokr whole": ("LoKr", lambda d: dict(target_modules=LINEAR[d])),
    "lokr of four factors": ("LoKr", lambda d: dict(r=1, target_modules="all-linear", decompose_both=True)),
    "lokr by a factor": ("LoKr", lambda d: dict(r=2, decompose_factor=6, target_modules="all-linear")),
    "lokr by a divisor": (
        "LoKr",
        lambda d: dict(r=2, decompose_factor=8, init_weights="lycoris", target_modules="all-linear"),
    ),
    "oft": ("OFT", lambda d: dict(target_modules="all-linear")),
    "oft small": ("OFT", lambda d: dict(oft_block_size=6, num_cayley_neumann_terms=4)),
    "oft constrained": ("OFT", lambda d: dict(coft=True, eps=0.3, oft_block_size=8, target_modules="all-linear")),
    "oft exactly": ("OFT", lambda d: dict(oft_block_size=8, use_cayley_neumann=False)),
    "oft shared": ("OFT", lambda d: dict(r=3, oft_block_size=0, block_share=True, num_cayley_neumann_terms=7)),
}
CASES |= LLAMA
both = [(d, c) for d in ("gpt2", "llama") for c in CASES if d == "llama" or c not in LLAMA] + [("llama", "olora")]
CASES["olora"] = ("Lora", lambda d: dict(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=LINEAR[d]))


for start in ("pissa", "olora"):  # of a head that has its own weight
    CASES[f"{start} head"] = ("Lora", lambda d, s=start: dict(r=4, init_lora_weights=s, target_modules=["lm_head"]))
    both.append(("llama", f"{start} head"))
IN_FLOAT32 = ("pissa", "olora", "pissa head", "olora head")  # PEFT decomposes float32 weights only


def bases(dialect, case):
    """(ours, theirs, how close two results are)."""
    return (*base(dialect, "float32", gaps=True, tied=not case.endswith(" head")), 3e-5) if case in IN_FLOAT32 else (*base(dialect), 1e-7)


def configs(dialect, case):
    method, options = CASES[case]
    theirs = getattr(peft, f"{method}Config")
    task = {} if case == "lora regex" else {"task_type": "CAUSAL_LM"}
    return getattr(mp, f"{method}Config")(**options(dialect)), theirs(**options(dialect), **task)


def close(a, b, tolerance=1e-7):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_peft_reads_a_file_of_all_linear_layers_of_one_block(dialect, tmp_path):
    """It refuses the text beside layers_to_transform, so the file has names."""
    model, twin = base(dialect)
    config = mp.LoraConfig(r=4, target_modules="all-linear", layers_to_transform=[1])
    ours = train_ours(mp.get_peft_model(model, config))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    close(logits(theirs), ours(IDS).data)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(ours.layers)


@pytest.mark.parametrize(("dialect", "case"), [*both, ("gpt2", "olora")])
def test_our_file_gives_the_same_logits_gradients_and_step_in_peft(dialect, case, tmp_path):
    model, twin, tolerance = bases(dialect, case)
    start, ours = model(IDS).data.copy(), train_ours(mp.get_peft_model(model, configs(dialect, case)[0]))
    assert np.abs(ours(IDS).data - start).max() > 1e-2  # the training did something
    if case != "adalora":  # where a pruned triplet rests
        mp.assert_learning(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True).eval()
    fixed_divisor(theirs)
    close(logits(theirs), ours(IDS).data, tolerance)
    close(ours.merge_and_unload()(IDS).data, ours(IDS).data, 1e-5)

    again = mp.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    close(again(IDS).data, ours(IDS).data, tolerance)
    penalties = [c.penalty() for c in again.training_callbacks() if hasattr(c, "penalty")]  # PEFT's loss has them inside
    loss = sum(penalties, again.loss(IDS, IDS))
    loss.backward()
    their_loss = theirs.train()(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    their_loss.backward()
    rounded = max(tolerance, 1e-6)  # transformers computes the loss in float32, and so where its gradients begin
    close(loss.data, their_loss.item(), rounded)

    once = {id(p): (k, p) for k, p in reversed(state(again, "default").items()) if p.requires_grad}  # tied rows, too
    ours_by_key = dict(once.values())
    theirs_by_key = {
        k.replace(".default", "").replace("modules_to_save.", "").replace("vector.weight", "vector"): p
        for k, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert {k: p.shape for k, p in ours_by_key.items()} == {k: tuple(p.shape) for k, p in theirs_by_key.items()}
    for key, p in ours_by_key.items():
        if p.size == 0:
            continue  # a matrix whose triplets AdaLoRA pruned one and all
        scale = max(1e-3, float(theirs_by_key[key].grad.abs().max()))
        close(p.grad / scale, theirs_by_key[key].grad.numpy() / scale, rounded)
    mp.optim.AdamW(list(ours_by_key.values()), lr=1e-3).step()
    torch.optim.AdamW(list(theirs_by_key.values()), lr=1e-3).step()
    for key, p in ours_by_key.items():
        close(p.data, theirs_by_key[key].detach().numpy(), tolerance)
    close(model(IDS).data, start, 0)


@pytest.mark.parametrize(("dialect", "case"), both)
def test_their_file_gives_the_same_logits_here(dialect, case, tmp_path):
    model, twin, tolerance = bases(dialect, case)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(twin, configs(dialect, case)[1])
    ours = mp.get_peft_model(model, configs(dialect, case)[0])
    divisors = fixed_divisor(theirs)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (trainable, total - divisors)
    train_theirs(theirs).save_pretrained(tmp_path)
    loaded = mp.PeftModel.from_pretrained(model, tmp_path)
    close(loaded(IDS).data, logits(theirs), tolerance)
    loaded.save_pretrained(tmp_path / "again")
    close(mp.PeftModel.from_pretrained(model, tmp_path / "again")(IDS).data, logits(theirs), tolerance)


def test_the_readmes_own_loha_is_read_by_peft_and_reads_pefts(tmp_path, monkeypatch):
    """With PEFT's peft_type, which a method of one's own can have where none that is shipped has it."""
    for table, key in ((PEFT_TYPES, "LOHA"), (METHODS, "my-loha")):
        monkeypatch.setitem(table, key, None)  # both as before after the test
        del table[key]
    scope = {}
    exec(EXAMPLE.replace("MY_LOHA", "LOHA").replace("title=", 'name="my-loha", title='), scope)
    options = dict(r=4, alpha=6, target_modules=LINEAR["llama"])
    model, twin = base("llama")
    ours = train_ours(mp.get_peft_model(model, scope["HadamardConfig"](**options)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours").eval()
    assert isinstance(theirs.peft_config["default"], peft.LoHaConfig)
    close(logits(theirs), ours(IDS).data)
    again = peft.get_peft_model(theirs.unload(), peft.LoHaConfig(**options))
    train_theirs(again).save_pretrained(tmp_path / "theirs")
    loaded = mp.PeftModel.from_pretrained(model, tmp_path / "theirs")
    assert type(loaded.layers["model.layers.0.self_attn.q_proj"].adapters["default"]).__name__ == "Hadamard"
    close(loaded(IDS).data, logits(again))
    assert np.abs(loaded(IDS).data - model(IDS).data).max() > 1e-2
    close(loaded.merge_and_unload()(IDS).data, logits(again), 1e-5)


def test_ofts_file_says_which_rotation_it_means(tmp_path):
    """PEFT before 0.18 truncated the series otherwise."""
    model, twin = base("llama")
    peft.get_peft_model(twin, peft.OFTConfig()).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    for version in ("0.17.1", None):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**options, "peft_version": version}))
        with pytest.raises(PeftError, match=r"before 0\.18\.0"):
            mp.PeftModel.from_pretrained(model, tmp_path)
    mp.get_peft_model(model, mp.OFTConfig()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.OFTConfig.from_pretrained(tmp_path)


def test_the_printed_line_is_pefts(capsys):
    model, twin = base("llama")
    mp.get_peft_model(model, mp.LoraConfig(r=4, modules_to_save=["lm_head"])).print_trainable_parameters()
    peft.get_peft_model(twin, peft.LoraConfig(r=4, modules_to_save=["lm_head"])).print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs


def test_parts_of_a_fused_layer_are_saved_as_the_adapter_of_the_whole_that_they_equal(tmp_path):
    model, twin = base("gpt2")
    for rslora in (False, True):
        config = mp.LoraConfig(r=4, lora_alpha=6, enable_lora=[True, False, True], use_rslora=rslora)
        ours = train_ours(mp.get_peft_model(model, config))
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
        assert theirs.peft_config["default"].r == 8
        close(logits(theirs), ours(IDS).data)
        twin = theirs.unload()


@pytest.mark.parametrize("case", ["lora", "dora", "vera", "adalora"])
def test_dropout_acts_on_the_input_of_the_adapter_alone(case, tmp_path):
    """PEFT's layer, given the mask that ours drew, computes the same."""
    model, twin = base("llama")
    name = {"vera": "vera_dropout"}.get(case, "lora_dropout")
    config = configs("llama", case)[0].replace(**{name: 0.4})
    ours = train_ours(mp.get_peft_model(model, config), steps=1)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    path = next(iter(ours.layers))
    layer, twin_layer = ours.layers[path], theirs.get_submodule(f"base_model.model.{path}").train()
    x = np.random.default_rng(0).standard_normal((2, 5, layer.in_features))
    kept = {}

    class Recorded(torch.nn.Module):  # replays our mask
        def forward(self, z):
            return z * torch.tensor(kept["mask"])

    from minipeft import functional as F

    dropout = F.dropout

    def recording(z, p, rng):
        y = dropout(z, p, rng)
        kept["mask"] = np.where(y.data == 0, 0, 1 / (1 - p))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", recording)
        y = layer(mp.Tensor(x), mp.backend.Rng(7))
    assert 0.2 < (kept["mask"] == 0).mean() < 0.6
    getattr(twin_layer, name)["default"] = Recorded()
    close(y.data, twin_layer(torch.tensor(x)).detach().numpy())


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_every_row_its_own_adapter_as_in_peft(dialect, tmp_path):
    """Logits and greedy continuations; PEFT mixes LoRA adapters, in evaluation alone (here in training as well)."""
    (model, twin), ours = base(dialect), None
    for seed, (name, case) in enumerate({"a": "lora", "b": "rslora", "c": "random"}.items()):
        config = configs(dialect, case)[0]
        if ours is None:
            ours = mp.get_peft_model(model, config, name)
        else:
            ours.add_adapter(name, config, seed)
        ours.set_adapter(name)
        train_ours(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "a", adapter_name="a")
    for name in "bc":
        theirs.load_adapter(tmp_path / name, name)
    theirs.eval()
    rows = ["b", "a", "__base__", "c", "a"]
    ids = np.random.default_rng(0).integers(0, 60, (5, 9))
    greedy = dict(attention_mask=torch.ones(5, 9), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), adapter_names=rows).logits.numpy()
        continued = theirs.generate(input_ids=torch.tensor(ids), adapter_names=rows, **greedy).numpy()
    close(ours(ids, adapter_names=rows).data, expected)
    np.testing.assert_array_equal(ours.generate(ids, adapter_names=rows, max_new_tokens=8), continued)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}), ("cat", {}), ("svd", {}), ("svd", {"svd_rank": 3}), ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}), ("magnitude_prune", {"density": 0.5}),
        ("ties_svd", {"density": 0.5}), ("dare_linear", {"density": 1.0}), ("dare_ties", {"density": 1.0}),
    ],
)  # fmt: skip
def test_combined_adapters_are_pefts(kind, options, tmp_path):
    model, twin = base("llama")
    common = dict(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    ours = mp.get_peft_model(model, mp.LoraConfig(**common), "a")
    ours.add_adapter("b", mp.LoraConfig(**{**common, "lora_alpha": 3}), seed=9)
    for name in "ab":
        ours.set_adapter(name)
        train_ours(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, **options)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, **options)
    ours.set_adapter("c")
    theirs.set_adapter("c")
    close(ours(IDS).data, logits(theirs), 1e-5)


def test_options_that_would_change_the_result_are_refused_by_name(tmp_path):
    model, twin = base("llama")
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_bias=False))
    theirs.save_pretrained(tmp_path)
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    for option, value in {
        "lora_bias": True, "bias": "all", "use_qalora": True, "layer_replication": [[0, 1]],
        "alora_invocation_tokens": [1], "an_option_of_tomorrow": 3, "init_lora_weights": "loftq",
    }.items():  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, option: value}))
        with pytest.raises(PeftError, match=option):
            mp.PeftModel.from_pretrained(model, tmp_path)


def test_pefts_olora_of_gpt2_is_refused_as_it_does_not_start_at_the_base(tmp_path):
    model, twin = base("gpt2", "float32")
    options = dict(r=4, init_lora_weights="olora", target_modules=["attn.c_proj"])
    theirs = peft.get_peft_model(twin, peft.LoraConfig(**options, task_type="CAUSAL_LM")).eval()
    assert np.abs(logits(theirs) - model(IDS).data).max() > 0.1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="init_lora_weights='olora' on GPT-2's"):
        mp.PeftModel.from_pretrained(model, tmp_path)
    ours = mp.get_peft_model(model, mp.LoraConfig(**options))
    close(ours(IDS).data, model(IDS).data, 1e-5)


def test_vera_without_its_projections_is_refused(tmp_path):
    model, twin = base("llama")
    theirs = peft.get_peft_model(twin, peft.VeraConfig(r=8, save_projection=False))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="projections"):
        mp.PeftModel.from_pretrained(model, tmp_path)


def test_adalora_prunes_the_triplets_that_peft_prunes():
    model, twin = base("llama")
    options = dict(ADALORA, total_step=8, tfinal=2, init_r=4, target_r=2, target_modules=LINEAR["llama"])
    ours = mp.get_peft_model(model, mp.AdaLoraConfig(**options))
    theirs = peft.get_peft_model(twin, peft.AdaLoraConfig(**options, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            key = key.replace(".default", "")
            if key in state(ours, "default"):
                p.copy_(torch.tensor(state(ours, "default")[key].data))
    fixed_divisor(theirs)
    train_ours(ours, steps=8)
    train_theirs(theirs, steps=8)
    pattern = {k.replace(".default", ""): v for k, v in theirs.peft_config["default"].rank_pattern.items()}
    assert ours.peft_config["default"].rank_pattern == pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    close(ours(IDS).data, logits(theirs), 1e-4)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_peft_finds_the_base_that_a_directory_remembers(tmp_path, load_in_4bit):
    mp.save_pretrained(base("llama", "float32")[0], tmp_path / "base")
    model, _ = mp.from_pretrained(tmp_path / "base", load_in_4bit=load_in_4bit)
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    twin = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert twin.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    if not load_in_4bit:
        np.testing.assert_allclose(logits(twin), adapted(IDS).numpy(), atol=1e-5)
    twin.save_pretrained(tmp_path / "theirs")
    mp.PeftModel.from_pretrained(mp.from_pretrained(tmp_path / "base")[0], tmp_path / "theirs")


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_loraplus_has_pefts_groups_and_takes_the_same_steps(dialect, tmp_path):
    """LoRA on linear layers and on the embedding; a matrix and (GPT-2) a norm that are trained beside it."""
    from peft.optimizers import create_loraplus_optimizer

    model, twin = base(dialect)
    names = ["embed_tokens", "q_proj", "down_proj"] if dialect == "llama" else ["wte", "c_attn", "c_proj"]
    saved = ["up_proj"] if dialect == "llama" else ["ln_f", "c_fc"]
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=4, target_modules=names, modules_to_save=saved))
    adapted.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    options = {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-4}
    groups = mp.optim.loraplus_groups(adapted, 1e-3, weight_decay=0.1, **options)
    others = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_weight_decay=0.1, **options)

    def described(groups, values):
        return [
            (g["lr"], g["weight_decay"], sorted(round(float(abs(values(p)).sum()), 6) for p in g["params"]))
            for g in groups
            if g["params"]
        ]

    assert described(groups, lambda pair: pair[1].data) == described(others.param_groups, lambda p: p.detach().numpy())
    ours = mp.optim.AdamW(groups)
    for _ in range(3):
        adapted.zero_grad()
        others.zero_grad()
        adapted.loss(IDS, IDS).backward()
        theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
        ours.step()
        others.step()
    assert np.abs(adapted(IDS).data - model(IDS).data).max() > 1e-2
    close(adapted(IDS).data, logits(theirs), 1e-5)


@pytest.mark.parametrize("case", ["tokens", "lora and tokens"])
def test_trained_rows_beside_an_untied_head_are_pefts_both_ways(case, tmp_path):
    model = mp.Transformer(
        mp.TransformerConfig.llama(**SHAPE, tie_word_embeddings=False, initializer_range=0.2), seed=5
    )
    ours = train_ours(mp.get_peft_model(model, configs("llama", case)[0]))
    ours.save_pretrained(tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(twin_of(model), tmp_path / "ours")), ours(IDS).data, 1e-4)
    theirs = train_theirs(peft.get_peft_model(twin_of(model), configs("llama", case)[1]))
    theirs.save_pretrained(tmp_path / "theirs")
    close(mp.PeftModel.from_pretrained(model, tmp_path / "theirs")(IDS).data, logits(theirs), 1e-4)


@pytest.mark.parametrize("config", [
    peft.LoraConfig(r=40, target_modules=["q_proj"]), peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[]),
    peft.IA3Config(init_ia3_weights=False),
], ids=["a rank above the width", "no layers", "another start"])  # fmt: skip
def test_what_peft_allows_is_read(config, tmp_path):
    torch.manual_seed(0)
    model, twin = base("llama")
    theirs = train_theirs(peft.get_peft_model(twin, config))
    theirs.save_pretrained(tmp_path)
    close(mp.PeftModel.from_pretrained(model, tmp_path)(IDS).data, logits(theirs))
