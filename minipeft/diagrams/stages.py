"""The three stages of RLHF (Ouyang et al. 2022, arXiv:2203.02155) and the four models of PPO: who is in memory when."""

from __future__ import annotations

from typing import Any

from ..accounting import count_parameters
from .drawing import GREY, ORANGE, box, cut, line, sheet, words

MODELS = ("policy", "value", "reference", "reward")
STAGES = (
    ("1 · Fine-tuning on demonstrations", {"policy": "trained"}),
    ("2 · A reward model from comparisons", {"reward": "trained"}),
    ("3 · PPO on the policy's own answers", {"policy": "trained", "value": "head", "reference": "frozen", "reward": "frozen"}),
)


def model_states(config: Any) -> dict[str, int]:
    """Bytes in float32 of a model that is "trained" (weights, gradients, Adam's two moments), of a "frozen" one (weights),
    and of a value "head", d weights and a bias, trained."""
    n, head = count_parameters(config).total, config.hidden_size + 1
    return {"trained": 16 * n, "frozen": 4 * n, "head": 16 * head}


def rlhf_stages(config: Any) -> Any:
    """A figure of the stages for policies and reward models of this shape; the value is a head on the policy, as in `rlhf`.

    Reward models count without their own head, which has as many numbers as the value's.
    """
    size = model_states(config)
    axes, said = sheet(), []
    column = {name: 2.8 + 9.1 * i for i, name in enumerate(MODELS)}
    top = {0: 12.5, 1: 27.5, 2: 42.5}
    for name, x in column.items():
        words(axes, x + 4.2, 6.3, name, fontweight="bold")
    for i, (title, held) in enumerate(STAGES):
        total = sum(size[state] for state in held.values())
        states = (f"{name} {'a trained head on the policy' if state == 'head' else state}" for name, state in held.items())
        said.append(f"{title}: {', '.join(states)}; {_bytes(total)}.")
        words(axes, 2.8, top[i] - 2, title, ha="left")
        words(axes, 38.5, top[i] - 2, _bytes(total), ha="right", fontweight="bold")
        for name, x in column.items():
            state = held.get(name)
            text = {None: "not in\nmemory", "head": f"a head on\nthe policy\n{_bytes(size['head'])}"}.get(
                state, f"{state}\n{_bytes(size.get(state, 0))}"
            )
            kind = {None: "absent", "head": "trained"}.get(state, state)
            box(axes, x, top[i], 8.4, 7.4, text, kind)
    down, bottom = {"color": ORANGE, "lw": 1.3}, 7.4
    policy, reference, reward = column["policy"], column["reference"] + 5.5, column["reward"] + 1.2
    line(axes, [(policy + 4.2, top[0] + bottom), (policy + 4.2, 22.5), (reward, 22.5), (reward, top[1])], **down)
    words(axes, 21, 21.4, "starts as a copy", color=ORANGE)
    line(axes, [(policy, top[0] + 3.7), (1.2, top[0] + 3.7), (1.2, top[2] + 3.7), (policy, top[2] + 3.7)], **down)
    line(axes, [(1.2, 37.5), (reference, 37.5), (reference, top[2])], **down)
    words(axes, 13, 36.4, "two copies", color=ORANGE)
    line(axes, [(reward, top[1] + bottom), (reward, top[2])], **down)
    words(axes, 20, 52.3, "trained: weights, gradients, Adam's two moments.", color=GREY)
    words(axes, 20, 54.4, "frozen: weights alone. All in float32.", color=GREY)
    said.append("The policy of stage 1 is copied three times: the reward model starts from it, and policy and reference of stage 3.")
    return cut(axes, 56, "Three stages, four models", " ".join(said))


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"
