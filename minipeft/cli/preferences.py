"""What the commands of RLHF share: pairs and prompts from a file, or made by the model and a rater who follows VADER."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from .arguments import add_model, natural, natural_int, positive, positive_int, proportion

WRITTEN_BY_ALL = (
    r"checkpoint-\d+|metrics\.jsonl|config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|"
    r"chat_template\.jinja|template\.json|model\.safetensors|adapter_config\.json|adapter_model\.safetensors|"
)
OPENING = 4  # words of a sentence that a made pair continues


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, --resume and --overwrite."""
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must be new or empty")
    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run's files (others stay)")


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Where preference pairs come from."""
    parser.add_argument(
        "--data", metavar="FILE", help="a .jsonl file of {prompt, chosen, rejected} (default: made pairs)"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--validation", type=proportion, default=0.1, metavar="FRACTION", help="share of pairs held out (default: 0.1)"
    )
    group.add_argument(
        "--template",
        metavar="NAME|TEXT",
        help="plain, alpaca, chatml or a text with {prompt} (default: the model's own)",
    )
    group.add_argument(
        "--max-length", type=positive_int, metavar="N", help="tokens of an example (default: the model's)"
    )
    group.add_argument(
        "--human", metavar="FILE", help="pairs of real people's ratings, from vaderSentiment-3.3.2.tar.gz in your hands"
    )
    group.add_argument("--pairs", type=positive_int, default=2000, metavar="N", help="pairs to make (default: 2000)")
    group.add_argument(
        "--rater-temperature",
        type=natural,
        default=0.1,
        metavar="T",
        help="noise of the rater of made pairs (default: 0.1)",
    )
    group.add_argument(
        "--rater-flip", type=proportion, default=0.0, metavar="P", help="share of its labels turned round (default: 0)"
    )
    group.add_argument(
        "--response-length", type=positive_int, default=24, metavar="N", help="of made answers (default: 24)"
    )


def add_training(group: Any, learning_rate: float, what: str) -> None:
    """The options of a Trainer's run."""
    group.add_argument("--epochs", type=positive, default=1.0, metavar="N", help="passes over the pairs (default: 1)")
    group.add_argument("--steps", type=positive_int, metavar="N", help="steps instead of epochs")
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help=f"{what} a step (default: 16)")
    group.add_argument(
        "--lr", type=positive, default=learning_rate, metavar="RATE", help="learning rate (default: %(default)s)"
    )
    group.add_argument(
        "--warmup", type=proportion, default=0.1, metavar="SHARE", help="share of the steps (default: 0.1)"
    )
    group.add_argument("--save-steps", type=positive_int, metavar="N", help="steps between checkpoints (default: 1/5)")
    group.add_argument(
        "--seed", type=natural_int, default=0, metavar="N", help="seed of everything random (default: 0)"
    )


def remove_earlier(output: Path, written: Any) -> None:
    """Remove what an earlier run of a command wrote into the directory, and nothing else."""
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if written.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def load_policy(model: str | None, adapter: str | None, backend: str | None, merge: bool = False) -> tuple[Any, Any]:
    """(policy, tokenizer): the shipped base or the model of a directory, with an adapter that is trained further or merged."""
    from ..peft.model import PeftModel
    from .models import load_model

    policy, tokenizer = load_model(model, backend)
    if adapter is not None:
        if not Path(adapter).is_dir():
            raise ValueError(f"--adapter {adapter}: there is no such directory")
        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=True)
        policy = policy.merge_and_unload() if merge else policy
    return policy, tokenizer


def add_method(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter and --method: what is trained."""
    add_model(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", help="an adapter directory, such as of minipeft sft, to train further"
    )
    parser.add_argument(
        "--method",
        choices=("full", "lora"),
        default="full",
        help="train all weights, or a new LoRA adapter (default: full)",
    )


def load_trained(args: argparse.Namespace) -> tuple[Any, Any]:
    """(policy, tokenizer): trained whole, through the adapter that it has, or through a new one."""
    from ..peft.lora import LoraConfig
    from ..peft.model import get_peft_model

    if args.adapter is not None and args.method == "lora":
        raise ValueError(
            "--adapter trains the adapter that is given; --method lora would make a new one: give one of them"
        )
    policy, tokenizer = load_policy(args.model, args.adapter, args.backend)
    if args.method == "lora":
        policy = get_peft_model(policy, LoraConfig(target_modules="all-linear"), seed=args.seed)
    return policy, tokenizer


def save_policy(policy: Any, tokenizer: Any, output: Path, template: str) -> None:
    """A model directory or an adapter directory, with the tokenizer, and the template where it is not plain."""
    from ..hub.pretrained import save_pretrained
    from .prompts import save_template

    if hasattr(policy, "save_pretrained"):
        policy.save_pretrained(output)
        tokenizer.save(output)
    else:
        save_pretrained(policy, output, tokenizer)
    if template != "plain":
        save_template(output, template)


def template_of(args: argparse.Namespace, tokenizer: Any) -> tuple[str, Any]:
    """(name, template) of --template, else of the adapter's or the model's directory, else plain."""
    from ..text.datasets import Completion
    from .prompts import chosen_template, saved_template

    option = args.template or saved_template(args.adapter) or saved_template(args.model) or "plain"
    name, template = chosen_template(option, Completion("-", "-"), tokenizer)
    return name or "plain", template


def load_pairs(args: argparse.Namespace, policy: Any, tokenizer: Any, template: Any) -> tuple[list[Any], list[Any]]:
    """(training, held-out) PreferencePairs of token ids, from --data, --human, or made here."""
    from ..text.datasets import DatasetError, Preference, read_dataset
    from ..text.examples import encode_preferences
    from .data import split_off

    limit = policy.config.max_position_embeddings
    if args.max_length and args.max_length > limit:
        raise ValueError(f"--max-length {args.max_length} is more than the {limit} positions of the model")
    if args.data and args.human:
        raise ValueError("give either --data or --human, not both")
    if args.human:
        from ..rlhf import human_preferences

        records = human_preferences(args.human, "train", args.pairs, args.seed)
    elif args.data:
        records = read_dataset(args.data)
        if not isinstance(records[0], Preference):
            raise DatasetError(args.data, None, "preference pairs are wanted: {prompt, chosen, rejected} on every line")
    else:
        return _made_pairs(args, policy, tokenizer, template)
    train, held_out = split_off(records, args.validation) if args.validation else (list(records), [])
    length = args.max_length or limit
    train, held_out = (encode_preferences(side, tokenizer, length, template) for side in (train, held_out))
    return train, held_out


def _made_pairs(args: argparse.Namespace, policy: Any, tokenizer: Any, template: Any) -> tuple[list[Any], list[Any]]:
    """Two answers of the policy to each opening of a sentence, and a rater who prefers the one VADER finds happier."""
    import numpy as np

    from .. import rlhf
    from .generate import stops
    from .prompts import asked

    ends = stops(policy, tokenizer, asked(template, "-"))
    rlhf.vader([])  # a missing extra is told before anything is computed
    rng, sides = np.random.default_rng(args.seed), []
    counts = {"train": args.pairs, "validation": round(args.validation * args.pairs)}
    for number, (split, n) in enumerate(counts.items()):
        texts = rlhf.sentence_openings(split, OPENING)
        prompts = [tokenizer.encode_pieces(asked(template, text).prompt, add_special_tokens=True) for text in texts]
        chosen = [prompts[i % len(prompts)] for i in rng.permutation(max(n, len(prompts)))[:n]]
        seed = 2 * args.seed + number
        answers = rlhf.sample_answers(policy, chosen, 2, args.response_length, stop_token_ids=ends, seed=seed)
        scores = np.array(
            [rlhf.vader([tokenizer.decode(a, skip_special_tokens=True) for a in own]) for own in answers]
        ).reshape(-1, 2)
        order = rlhf.rank(scores, rng, args.rater_temperature, args.rater_flip)
        sides.append(rlhf.preference_pairs(chosen, answers, order))
    return sides[0], sides[1]
