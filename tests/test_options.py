"""One declaration an option: its check, its flag and its documentation agree."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from minipeft.options import add_options, check, configuration, from_arguments, option


@configuration
class Settings:
    """Of a run."""

    learning_rate: float = option(1e-3, "peak learning rate", above=0, flag="--lr")
    max_steps: int | None = option(None, "optimizer steps", least=1)
    target_modules: list[str] | str | None = option(None, "names")
    init: bool | str = option(True, "how it starts", choices=(True, False, "pissa"))
    packing: bool = option(False, "share rows")
    progress: bool = option(True, "a bar")
    rank_pattern: dict[str, int] = option({}, "ranks by name", least=1)
    dropout: float = option(0.0, "probability", least=0, below=1)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, or None, got 0"),
        ({"max_steps": True}, "max_steps must be an integer of at least 1, or None, got True"),
        ({"max_steps": 2.0}, "max_steps must be an integer of at least 1, or None, got 2.0"),
        ({"target_modules": 3}, "target_modules must be a list, each a text, or a text, or None, got 3"),
        ({"init": 1}, "init must be one of True, False, pissa, got 1"),
        ({"packing": "no"}, "packing must be True or False, got 'no'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern must be a dictionary, each value an integer of at least 1, got"),
        ({"dropout": 1}, "dropout must be a number of at least 0 and below 1, got 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(given, sentence):
    with pytest.raises(ValueError) as error:
        Settings(**given)
    assert str(error.value).startswith(sentence)


def test_numpy_scalars_become_python_numbers():
    made = Settings(max_steps=np.int64(3), learning_rate=np.float32(0.5))
    assert type(made.max_steps) is int and type(made.learning_rate) is float


def test_a_mutable_default_is_each_ones_own():
    Settings().rank_pattern["q"] = 1
    assert Settings().rank_pattern == {}


def test_the_command_line_has_the_defaults_of_the_class():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Settings)
    assert from_arguments(Settings, parser.parse_args([])) == Settings()
    line = "--lr 0.5 --max-steps 4 --target-modules q v --packing --no-progress".split()
    wanted = Settings(learning_rate=0.5, max_steps=4, target_modules=["q", "v"], packing=True, progress=False)
    assert from_arguments(Settings, parser.parse_args(line)) == wanted
    with pytest.raises(argparse.ArgumentError, match="must be a number above 0, not '0'"):
        parser.parse_args(["--lr", "0"])
    assert "peak learning rate (default: 0.001)" in " ".join(parser.format_help().split())


def test_a_command_may_have_defaults_of_its_own_and_a_switch_may_take_a_value():
    @configuration
    class More(Settings):
        rows: bool | int = option(False, "share rows, of N tokens", least=1)
        again: bool | None = option(None, "compute again")

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, More, "rows", "again", "learning_rate", "dropout", defaults={"learning_rate": None, "dropout": 0.5})
    assert vars(parser.parse_args([])) == {"learning_rate": None, "dropout": 0.5}
    assert vars(parser.parse_args(["--rows", "--no-again"])) == vars(parser.parse_args([])) | {"rows": True, "again": False}
    assert parser.parse_args(["--rows", "8", "--again"]).rows == 8
    assert "probability (default: 0.5)" in " ".join(parser.format_help().split())


def test_the_docstring_lists_the_options():
    assert "learning_rate   peak learning rate (default: 0.001)" in Settings.__doc__


def test_another_error_and_a_post_init_of_its_own():
    @configuration
    class Own:
        n: int = option(1, "a number", least=1)

        def __post_init__(self):
            check(self, KeyError)

    with pytest.raises(KeyError, match="n must be an integer of at least 1"):
        Own(n=0)
