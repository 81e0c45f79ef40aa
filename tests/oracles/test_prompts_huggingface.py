"""Prompt tuning, prefix tuning and P-tuning against Hugging Face PEFT: files both ways, gradients, one AdamW step.

PEFT's prompt methods give logits for the virtual positions too; ours only for the input's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_peft_huggingface import IDS, base, close, peft, train_ours, train_theirs
from twins import torch, transformers

import minipeft as mp
from minipeft.peft.config import PeftError

pytestmark = pytest.mark.filterwarnings("ignore")

P = 4
REAL = np.ones(IDS.shape, bool)
REAL[1, :3] = False
MASK = REAL.astype(int)
IN_FLOAT32 = 1e-6  # PEFT reads prompts into float32, whatever the model's dtype
CASES = {
    "prompt": ("PromptTuning", {}),
    "prompt from the vocabulary": ("PromptTuning", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": ("PrefixTuning", {}),
    "prefix from zero": ("PrefixTuning", {"init_weights": "zero"}),
    "prefix by an MLP": ("PrefixTuning", {"prefix_projection": True}),
    "prefix by a wider MLP": ("PrefixTuning", {"prefix_projection": True, "encoder_hidden_size": 24}),
    "p-tuning": ("PromptEncoder", {}),
    "p-tuning, narrow": ("PromptEncoder", {"encoder_hidden_size": 12}),
}
both = [(dialect, case) for dialect in ("gpt2", "llama") for case in CASES]


def configs(case):
    method, options = CASES[case]
    ours, theirs = getattr(mp, f"{method}Config"), getattr(peft, f"{method}Config")
    return ours(num_virtual_tokens=P, **options), theirs(num_virtual_tokens=P, task_type="CAUSAL_LM", **options)


def their_logits(model, ids=IDS, **arguments):
    """Those of the input's positions."""
    with torch.no_grad():
        return model(torch.tensor(ids), **arguments).logits.numpy()[:, -ids.shape[1] :]


def trained(dialect, case, directory):
    """(our base, ours trained and saved, PEFT's model of that directory)."""
    model, twin = base(dialect)
    ours = train_ours(mp.get_peft_model(model, configs(case)[0]))
    ours.save_pretrained(directory)
    return model, ours, peft.PeftModel.from_pretrained(twin, directory).eval()


def their_parameters(model):
    return {name: p for name, p in model.prompt_encoder["default"].named_parameters()}


def our_parameters(model):
    """Under PEFT's names."""
    mlp = "transform" if model.peft_config["default"].peft_type == "PREFIX_TUNING" else "mlp_head"
    names = {"prompt_embeddings": "embedding.weight", "e": "embedding.weight"}
    names |= {f"{n}{i + 1}": f"{mlp}.{2 * i}.{word}" for i in range(3) for n, word in (("W", "weight"), ("b", "bias"))}
    return {names[name]: p for name, p in model.prompts["default"].named_parameters()}


@pytest.mark.parametrize(("dialect", "case"), both)
def test_the_loss_gradients_and_one_step_are_pefts(dialect, case):
    model, twin = base(dialect)
    ours_config, theirs_config = configs(case)
    before = {path: p.data.copy() for path, p in model.named_parameters()}
    ours = mp.get_peft_model(model, ours_config)
    theirs = peft.get_peft_model(twin, theirs_config).double().train()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    mine, twins = our_parameters(ours), their_parameters(theirs)
    assert {k: p.shape for k, p in mine.items()} == {k: tuple(p.shape) for k, p in twins.items()}
    for name, p in mine.items():
        twins[name].data = torch.tensor(p.data)

    optimizer = mp.optim.AdamW(list(mine.values()), lr=1e-2)
    their_optimizer = torch.optim.AdamW(list(twins.values()), lr=1e-2)
    for _ in range(3):
        ours.zero_grad()
        their_optimizer.zero_grad()
        loss = ours.loss(IDS, IDS)
        loss.backward()
        their_loss = theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        their_loss.backward()
        close(loss.data, their_loss.item(), 1e-6)
        for name, p in mine.items():
            scale = max(1e-3, float(twins[name].grad.abs().max()))
            close(p.grad / scale, twins[name].grad.numpy() / scale, 1e-6)
        optimizer.step()
        their_optimizer.step()
        for name, p in mine.items():
            close(p.data, twins[name].detach().numpy(), 1e-6)
    for path, p in model.named_parameters():
        assert (p.data == before[path]).all(), path


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["PromptTuning", "PrefixTuning"])
def test_a_head_trained_beside_is_in_the_file_under_pefts_name(dialect, method, tmp_path):
    options = {"num_virtual_tokens": P, "modules_to_save": ["lm_head"]}
    model, twin = base(dialect)
    ours = train_ours(mp.get_peft_model(model, getattr(mp, f"{method}Config")(**options)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours").eval()
    close(their_logits(theirs), ours(IDS).data, IN_FLOAT32)
    theirs.save_pretrained(tmp_path / "theirs")
    close(mp.PeftModel.from_pretrained(model, tmp_path / "theirs")(IDS).data, ours(IDS).data, IN_FLOAT32)


@pytest.mark.parametrize(("dialect", "case"), both)
def test_our_file_gives_the_same_logits_in_peft(dialect, case, tmp_path):
    model, ours, theirs = trained(dialect, case, tmp_path)
    mp.assert_learning(ours)
    close(their_logits(theirs), ours(IDS).data, IN_FLOAT32)
    close(mp.PeftModel.from_pretrained(model, tmp_path)(IDS).data, ours(IDS).data, 0)
    assert np.abs(ours(IDS).data - model(IDS).data).max() > 1e-2


@pytest.mark.parametrize(("dialect", "case"), both)
def test_their_file_gives_the_same_logits_here(dialect, case, tmp_path):
    model, twin = base(dialect)
    torch.manual_seed(0)
    theirs = train_theirs(peft.get_peft_model(twin, configs(case)[1]).double())
    theirs.save_pretrained(tmp_path)
    ours = mp.PeftModel.from_pretrained(model, tmp_path)
    close(ours(IDS).data, their_logits(theirs))
    ours.save_pretrained(tmp_path / "again")
    close(mp.PeftModel.from_pretrained(model, tmp_path / "again")(IDS).data, their_logits(theirs))
    again = peft.PeftModel.from_pretrained(theirs.get_base_model(), tmp_path / "again").eval()
    close(their_logits(again), their_logits(theirs), IN_FLOAT32)


@pytest.mark.parametrize("case", ["prompt", "prefix", "p-tuning"])
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_greedy_continuations_are_those_of_pefts_forward(dialect, case, tmp_path):
    _, ours, theirs = trained(dialect, case, tmp_path)
    expected = IDS
    for _ in range(8):  # not by its generate, which with transformers 5 computes something else than its forward
        tokens = their_logits(theirs, expected)[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, tokens[:, None]], axis=1)
    np.testing.assert_array_equal(ours.generate(IDS, max_new_tokens=8), expected)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_left_padding_is_pefts_where_it_takes_positions(dialect, tmp_path):
    """PEFT's prefix tuning takes position_ids, which transformers counts over padding unless they are given."""
    _, ours, theirs = trained(dialect, "prefix", tmp_path)
    positions = np.maximum(MASK.cumsum(axis=1) - 1, 0)
    expected = their_logits(theirs, attention_mask=torch.tensor(MASK), position_ids=torch.tensor(positions))
    close(ours(IDS, attention_mask=MASK).data[REAL], expected[REAL], IN_FLOAT32)
    close(ours(IDS, attention_mask=MASK, position_ids=positions).data[REAL], expected[REAL], IN_FLOAT32)


def test_a_prompt_before_left_padding_is_the_models_own_computation():
    """PEFT ignores position_ids here, so transformers is given what PEFT builds, with them."""
    model, twin = base("llama")
    ours = train_ours(mp.get_peft_model(model, configs("prompt")[0]))
    whole = np.concatenate([np.ones((3, P), int), MASK], axis=1)
    prompts = torch.tensor(ours.prompts["default"].vectors().data).expand(3, -1, -1)
    with torch.no_grad():
        embeds = torch.cat([prompts, twin.get_input_embeddings()(torch.tensor(IDS))], dim=1)
        positions = torch.tensor(np.maximum(whole.cumsum(axis=1) - 1, 0))
        expected = twin(inputs_embeds=embeds, attention_mask=torch.tensor(whole), position_ids=positions).logits.numpy()
    close(ours(IDS, attention_mask=MASK).data[REAL], expected[:, P:][REAL])


def test_a_text_gives_the_start_that_it_gives_in_peft(tmp_path):
    base_model, tokenizer = mp.load_base()
    twin = transformers.AutoModelForCausalLM.from_pretrained(saved := Path(mp.hub.__file__).parent / "base")
    for text in ("Say it again", "a text of rather more tokens than there are virtual ones"):
        options = dict(
            num_virtual_tokens=8,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(saved),
        )
        ours = mp.get_peft_model(base_model, mp.PromptTuningConfig(**options))
        theirs = peft.get_peft_model(twin, peft.PromptTuningConfig(task_type="CAUSAL_LM", **options))
        expected = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
        np.testing.assert_array_equal(ours.prompts["default"].prompt_embeddings.data, expected)
        ids = tokenizer.encode(text)
        by_ids = mp.PromptTuningConfig(
            num_virtual_tokens=8, prompt_tuning_init="TEXT", prompt_tuning_init_ids=list(ids)
        )
        np.testing.assert_array_equal(mp.get_peft_model(base_model, by_ids).prompts["default"].vectors().data, expected)
        mp.get_peft_model(base_model, by_ids).save_pretrained(tmp_path)  # says no tokenizer: PEFT takes it all the same
        again = peft.PeftModel.from_pretrained(twin, tmp_path)
        np.testing.assert_array_equal(again.prompt_encoder["default"].embedding.weight.detach().numpy(), expected)


def test_an_lstms_file_loads_and_options_of_other_models_are_refused(tmp_path):
    model, twin = base("llama")
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=P, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    )
    theirs = peft.get_peft_model(twin, config).double().eval()
    theirs.save_pretrained(tmp_path)
    close(mp.PeftModel.from_pretrained(model, tmp_path)(IDS).data, their_logits(theirs))
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    for option, value in {
        "num_transformer_submodules": 2, "task_type": "SEQ_2_SEQ_LM", "token_dim": 16,
        "num_virtual_tokens": 40, "tomorrow": 1,
    }.items():  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, option: value}))
        with pytest.raises(PeftError, match=option):
            mp.PeftModel.from_pretrained(model, tmp_path)
