"""Settings: what round-trips, what is refused, and in which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.config import ContextConfig, GateConfig, ModelConfig, RunConfig, TrainConfig, load_config, to_toml
from perdure.types import InputError


def refused(tmp_path, text: str) -> str:
    """The message with which a TOML text is refused."""
    path = tmp_path / "perdure.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    return str(caught.value)


def test_toml_round_trip_of_changed_settings(tmp_path):
    config = RunConfig(
        seed=7,
        model=ModelConfig(source='C:\\models\\"quoted" ü', max_window=512),
        context=ContextConfig(template="turns:4", candidates=()),
        train=TrainConfig(divergence="generalized_jsd", jsd_beta=0.1, teacher="ema", teacher_update_rate=1e-3),
        gate=GateConfig(enforce=False),
    )
    path = tmp_path / "perdure.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path) != RunConfig()


@given(
    rate=st.floats(1e-12, 1.0), steps=st.integers(1, 10**9), share=st.floats(0, 0.9), seed=st.integers(-(2**62), 2**62)
)
def test_every_number_survives_the_round_trip(tmp_path_factory, rate, steps, share, seed):
    config = RunConfig(seed=seed, train=TrainConfig(learning_rate=rate, steps=steps, anchor_share=share))
    path = tmp_path_factory.mktemp("config") / "perdure.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "perdure.toml").write_text("", encoding="utf-8")
    assert load_config(tmp_path / "perdure.toml") == RunConfig()
    assert RunConfig().gate.enforce is True


def test_all_wrong_keys_are_listed_at_once(tmp_path):
    text = refused(
        tmp_path, 'sed = 1\n[train]\nstep = 3\nlearning_rate = -1\nteacher = "slow"\n[gatee]\nbudget = 0.1\n'
    )
    for key in ("sed", "train.step", "train.learning_rate", "train.teacher", "gatee"):
        assert f"\n  {key}: " in text
    assert text.count("\n  ") == 5
    assert text.startswith(str(tmp_path / "perdure.toml"))


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0", "0.0", '"fast"'])
def test_a_learning_rate_must_be_a_positive_finite_number(tmp_path, value):
    assert "train.learning_rate" in refused(tmp_path, f"[train]\nlearning_rate = {value}\n")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ('support = "sampled"', 'divergence = "reverse_kl"'),
        ('support = "sampled"\ndivergence = "reverse_kl"\nanchor_share = 0', "warm_start_steps = 0"),
        ('support = "sampled"\ndivergence = "reverse_kl"\nwarm_start_steps = 0', "anchor_share = 0"),
        ('support = "sampled"\ndivergence = "reverse_kl"\nwarm_start_steps = 0\nanchor_share = 0\n'
         "sampling_temperature = 0.7", "sampling_temperature = 1"),
        ('support = "sampled"\ndivergence = "reverse_kl"\nwarm_start_steps = 0\nanchor_share = 0',
         "demonstration_weight = 0"),
        ('support = "sampled"\nmethod = "sft"', 'method = "sdft"'),
        ("steps = 20\non_policy_share = 0.5", "on_policy_share has an effect only after the warm start"),
        ('method = "sft_replay"\nanchor_weight = 2', "anchor_weight weighs a divergence"),
        ("jsd_beta = 0.3", "jsd_beta"),
        ("topk = 5", "topk"),
        ("teacher_update_rate = 0.5", "teacher_update_rate"),
        ('teacher = "live"\nteacher_update_rate = 0.5', "teacher_update_rate"),
        ("batch_size = 1\nanchor_share = 0.9", "no row to learn"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(tmp_path, settings, word):
    text = refused(tmp_path, "[train]\n" + settings + "\n")
    assert "  train: " in text and word in text


def test_two_impossible_combinations_are_both_named(tmp_path):
    text = refused(tmp_path, "[train]\ntopk = 5\njsd_beta = 0.3\n")
    assert "topk" in text and "jsd_beta" in text


@pytest.mark.parametrize(
    "settings",
    [
        'support = "teacher_topk"\ntopk = 5',
        'teacher = "ema"\nteacher_update_rate = 0.5',
        'divergence = "generalized_jsd"\njsd_beta = 0.3',
        'support = "sampled"\ndivergence = "reverse_kl"\nwarm_start_steps = 0\nanchor_share = 0\n'
        "demonstration_weight = 0",
        'method = "sft"\nanchor_share = 0',
    ],
)
def test_possible_combinations_are_taken(tmp_path, settings):
    (tmp_path / "perdure.toml").write_text("[train]\n" + settings + "\n", encoding="utf-8")
    load_config(tmp_path / "perdure.toml")


def test_auto_needs_candidates(tmp_path):
    assert "candidates" in refused(tmp_path, "[context]\ncandidates = []\n")


def test_broken_toml_names_the_line(tmp_path):
    assert refused(tmp_path, "seed = 1\n[train\n").startswith(f"{tmp_path / 'perdure.toml'}:2: not valid TOML")
    assert "not valid TOML" in refused(tmp_path, "[train]\nsteps = ")


def test_other_encodings_and_missing_files_are_refused(tmp_path):
    (tmp_path / "perdure.toml").write_bytes(b"seed = 1\n# caf\xe9\n")
    with pytest.raises(InputError, match=r"perdure\.toml:2: not UTF-8"):
        load_config(tmp_path / "perdure.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "absent.toml")


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3  # type: ignore[misc]


def test_a_settings_file_says_what_each_setting_means():
    text = to_toml(RunConfig())
    assert "# Rows a step, anchors included.\nbatch_size = 16\n" in text
    assert "# What a candidate must keep to become the champion (docs/gate.md).\n[gate]\n" in text
    assert max(map(len, text.splitlines())) <= 110 and "``" not in text
    sections = [name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")]
    for section in sections:
        before = text.partition(f"\n[{section}]\n")[0]
        assert before.splitlines()[-1].startswith("# "), section
        assert "A part of a settings file" not in text


def test_auto_may_be_given_what_sdft_uses(tmp_path):
    """Whether it is SDFT is known after the preflight; what neither of its methods uses is refused now."""
    assert TrainConfig(method="auto", on_policy_share=0.5, demonstration_weight=0.2).method == "auto"
    assert "kl_weight" in refused(tmp_path, '[train]\nmethod = "auto"\nkl_weight = 0.3')
