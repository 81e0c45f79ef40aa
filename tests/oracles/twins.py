"""transformers' models with the weights of ours."""

import pytest

from minipeft.hub.configuration import to_hugging_face

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")


class Angles(torch.nn.Module):
    """Llama's cos and sin, [B, T, D], in float64."""

    def __init__(self, config):
        super().__init__()
        half = config.head_dim // 2
        self.frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, x, position_ids, *_):
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def twin_of(model, dtype="float64", task="CausalLM", **options):
    """transformers' model with the weights of `model`, a float32 or float64 one, in evaluation mode.

    transformers computes Llama's norms and rotations in float32 whatever the model's dtype, so in float64 the norm is
    PyTorch's RMSNorm, and the angles are float64's. In float32 the twin is transformers' own.
    """
    c = model.config
    config = transformers.AutoConfig.for_model(**to_hugging_face(c, "float32"), **options)
    twin = getattr(transformers, f"AutoModelFor{task}").from_config(config, attn_implementation="sdpa")
    if dtype == "float64" and c.model_type == "llama":
        twin.model.rotary_emb = Angles(c)
        for module in list(twin.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, torch.nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps))
    twin = twin.to(getattr(torch, dtype)).eval()
    weights = {name: torch.tensor(array) for name, array in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert dict(twin.named_parameters()).keys() == dict(model.named_parameters()).keys()
    return twin
